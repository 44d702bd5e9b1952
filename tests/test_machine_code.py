"""Kernels that run without numba once they were compiled."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from gradscope import machine_code
from gradscope.compiled import Kernel
from gradscope.errors import OutputError

LOOPS = """
    import numpy as np
    from gradscope.compiled import kernel

    FACTOR = 3

    @kernel()
    def _times(x):
        return x * FACTOR

    @kernel(alone=True)
    def add(x, y, by, out):
        for i in range(x.shape[0]):
            out[i] = _times(x[i]) + y[i, 0] / by

    @kernel(alone=True)
    def copy(x, out):
        out[:] = np.sort(x)

    def of(power):
        @kernel(alone=True)
        def raised(x, out):
            for i in range(x.shape[0]):
                out[i] = x[i] ** power
        return raised

    square, cube = of(2), of(3)
"""


def module(folder: Path, source: str = LOOPS, name: str = "loops") -> ModuleType:
    """Executed from its source, whose time never changes: what is cached by that would be kept."""
    path = folder / f"{name}.py"
    path.write_text(textwrap.dedent(source))
    os.utime(path, (0, 0))
    made = ModuleType(name)
    made.__file__ = str(path)
    exec(compile(path.read_text(), path, "exec"), made.__dict__)
    return made


def added(loops: ModuleType, kind: str = "f8", count: int = 5) -> np.ndarray:
    x, y = np.arange(count).astype(kind), np.ones((count, 2), kind)
    out = np.zeros(count)
    loops.add(x, y, np.float32(2), out)
    return out


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("__pycache__/*.o"))


def without_numba(kernel: Kernel) -> bool:
    return not {"jitted", "_part"} & kernel.__dict__.keys()


@pytest.mark.parametrize("kind", ["f4", "f8", "u1", "u2", "u4", "i4", "i8"])
def test_machine_code_gives_what_the_loop_says_for_every_type(tmp_path: Path, kind: str) -> None:
    loops = module(tmp_path)

    assert added(loops, kind).tolist() == [0.5, 3.5, 6.5, 9.5, 12.5]
    assert added(loops, kind, 0).tolist() == []
    assert len(files(tmp_path)) == 1


def test_a_second_module_runs_the_code_of_the_first_without_numba(tmp_path: Path) -> None:
    first, second = module(tmp_path), module(tmp_path)

    assert added(first).tolist() == added(second).tolist()
    assert not without_numba(first.add)
    assert without_numba(second.add)


def test_a_process_that_finds_the_code_does_not_import_numba(tmp_path: Path) -> None:
    added(module(tmp_path))
    script = (
        "import sys, loops, numpy as np\n"
        "out = np.zeros(1)\n"
        "loops.add(np.ones(1), np.ones((1, 2)), np.float32(2), out)\n"
        "print(out[0], 'numba' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.split() == ["3.5", "False"]


@pytest.mark.parametrize(
    ("old", "new", "third"),
    [("x * FACTOR", "x * (FACTOR + 1)", 8.5), ("FACTOR = 3", "FACTOR = 5", 10.5)],
    ids=["a kernel that it calls", "a constant of that one"],
)
def test_code_is_made_anew_when_what_it_depends_on_changes(
    tmp_path: Path, old: str, new: str, third: float
) -> None:
    added(module(tmp_path))

    assert added(module(tmp_path, LOOPS.replace(old, new)))[2] == third
    assert len(files(tmp_path)) == 2


def test_code_is_made_anew_when_a_kernel_of_another_module_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = textwrap.dedent(LOOPS)
    others = "from own import _times\n" + own.replace("def _times", "def _unused")
    results = []
    for factor in (3, 5):
        changed = own.replace("FACTOR = 3", f"FACTOR = {factor}")
        monkeypatch.setitem(sys.modules, "own", module(tmp_path, changed, "own"))
        results.append(added(module(tmp_path, others, "others"))[2])

    assert results == [6.5, 10.5]


def test_kernels_made_by_one_function_keep_their_own_constants(tmp_path: Path) -> None:
    loops = module(tmp_path)
    out = np.zeros((2, 3))

    loops.square(np.arange(3.0), out[0])
    loops.cube(np.arange(3.0), out[1])

    assert out.tolist() == [[0, 1, 4], [0, 1, 8]]


@pytest.mark.parametrize("kept", [0, 40, -1], ids=["empty", "cut", "all but a byte"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, kept: int) -> None:
    added(module(tmp_path))
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])

    mended, next_one = module(tmp_path), module(tmp_path)

    assert added(mended)[1] == added(next_one)[1] == 3.5
    assert not without_numba(mended.add)
    assert without_numba(next_one.add)


def test_a_file_with_one_bit_turned_is_made_anew(tmp_path: Path) -> None:
    added(module(tmp_path))
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    mended = module(tmp_path)

    assert added(mended)[1] == 3.5
    assert not without_numba(mended.add)


def test_numba_runs_what_no_folder_takes(tmp_path: Path) -> None:
    (tmp_path / "__pycache__").write_text("a file where a folder is wanted")
    loops = module(tmp_path)

    assert added(loops)[1] == 3.5
    assert not without_numba(loops.add)


def test_a_full_disk_costs_the_file_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _write: object) -> None:
        raise OutputError(path, "No space left on device")

    loops = module(tmp_path)
    monkeypatch.setattr(machine_code, "write_whole", full)

    assert added(loops)[1] == 3.5
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "x",
    [np.arange(10.0)[::2], np.frombuffer(bytes(range(41)), "u1")[1:].view("u8")],
    ids=["every second", "not aligned"],
)
def test_numba_runs_arrays_that_do_not_lie_as_in_c(tmp_path: Path, x: np.ndarray) -> None:
    loops, out = module(tmp_path), np.zeros(5)

    loops.add(x, np.ones((5, 2)), np.float32(2), out)

    assert out.tolist() == (3 * x + 0.5).tolist()
    assert files(tmp_path) == []


def test_numbers_of_the_other_byte_order_are_not_misread(tmp_path: Path) -> None:
    x = np.arange(5.0, dtype=">f8")

    with pytest.raises(Exception, match="Unsupported array dtype: >f8"):
        module(tmp_path).add(x, np.ones((5, 2)), np.float32(2), np.zeros(5))


def test_an_array_that_must_not_be_written_is_read(tmp_path: Path) -> None:
    loops = module(tmp_path)
    x, out = np.arange(3.0), np.zeros(3)
    x.flags.writeable = False

    loops.add(x, np.ones((3, 2)), np.float32(2), out)

    assert out.tolist() == [0.5, 3.5, 6.5]


def test_a_kernel_that_cannot_be_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"copy-.* cannot run alone: it needs .*NRT_"):
        module(tmp_path).copy(np.ones(3), np.ones(3))


def test_threads_that_come_first_together_share_one_code(tmp_path: Path) -> None:
    loops = module(tmp_path)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: added(loops)[4], range(32)))

    assert results == [12.5] * 32
    assert len(files(tmp_path)) == 1
