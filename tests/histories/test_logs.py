"""Training logs as people have them: what loops print, among what else they print."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradscope import analyze_flow
from gradscope.errors import InputError, UsageError
from gradscope.histories.history import History
from gradscope.histories.logs import said_by
from gradscope.histories.names import ONLY_LOSS, ONLY_TOTAL
from gradscope.histories.open import open_history

#: transformers, ``PrinterCallback`` and ``ProgressCallback`` of trainer_callback.py: the latter
#: has written strings since version 5. TRL and Axolotl print the same with more keys.
HUGGING_FACE = """\
  1%|          | 10/1000 [00:05<08:15,  2.00it/s]
{'loss': 2.5, 'grad_norm': 1.25, 'learning_rate': 0.0001, 'epoch': 0.1}
Saving model checkpoint to out/checkpoint-10
{'eval_loss': 9.0, 'eval_runtime': 1.2, 'epoch': 0.1}
{'loss': '2.0', 'grad_norm': '1.5', 'learning_rate': '5e-05', 'logps/chosen': '9', 'epoch': '0.2'}
{'train_runtime': 100.1, 'train_loss': 7.0, 'epoch': 3.0}
"""
#: Megatron-LM, ``training_log`` of megatron/training/training.py: the first interval, whose steps
#: were all skipped, has neither loss nor norm.
MEGATRON = """\
time to initialize megatron (seconds): 5.1
 [2025-04-13 23:41:12] iteration       10/    1000 | consumed samples:          160 | elapsed time \
per iteration (ms): 1147.6 | learning rate: 0.000000E+00 | global batch size:    16 | loss scale: \
8388608.0 | number of skipped iterations:  10 | number of nan iterations:   0 |
[Rank 0] (after 10 iterations) memory (MB) | allocated: 1464.33154296875 | max allocated: 1464.34
 [2024-01-01 10:00:00] iteration      100/    5000 | consumed samples:        25600 | elapsed time \
per iteration (ms): 612.3 | throughput per GPU (TFLOP/s/GPU): 300.1 | learning rate: 1.000000E-04 \
| decoupled learning rate: 5.000000E-04 | global batch size:   256 | lm loss: 2.500000E+00 | mtp_1 \
loss: 9.000000E+00 | load_balancing_loss: 9.0E+00 | loss scale: 4096.0 | grad norm: 1.250 | num \
zeros: 71.0 | params norm: 99.125 | number of skipped iterations:   0 | number of nan iterations: \
  0 |
 validation loss at iteration 100 | lm loss value: 9.3E+00 | lm loss PPL: 1.0E+01 |
 [2024-01-01 10:10:00] iteration      200/    5000 | learning rate: 5.000E-05 | lm loss: \
2.000000E+00 | loss scale: 4096.0 | grad norm: 1.500 | number of skipped iterations:   0 |
"""
#: torchtitan, ``MetricsProcessor.log`` and ``log_validation`` of components/metrics.py.
TORCHTITAN = """\
[rank0]:[titan] 2024-10-01 12:00:00,000 - root - INFO - \x1b[31mstep: 100  \x1b[32mloss:  2.5000  \
\x1b[38;2;180;60;0mgrad_norm:  1.2500  \x1b[36mmemory: 10.00GiB(12.64%)  \x1b[34mtps: 1,234  \
\x1b[36mtflops: 1,010.50  \x1b[35mmfu: N/A\x1b[39m
[rank1]:[titan] 2024-10-01 12:00:00,000 - root - INFO - step: 100  loss:  7.0  grad_norm:  7.0
[rank0]:[titan] 2024-10-01 12:00:01,000 - root - INFO - validate step: 100  loss:  9.1  memory: 1GiB
[rank0]:[titan] 2024-10-01 12:00:02,000 - root - INFO - step: 200  loss:  2.0  grad_norm:  1.5
"""
#: fairseq, ``SimpleProgressBar`` and ``JsonProgressBar`` of logging/progress_bar.py.
FAIRSEQ = """\
2021-01-01 12:00:00 | INFO | train_inner | epoch 001:    100 / 1000 loss=2.5, nll_loss=9.1, \
ppl=9000.1, wps=1000, num_updates=100, lr=0.0001, gnorm=1.25, clip=100, loss_scale=128, wall=12
2021-01-01 12:00:00 | INFO | valid | epoch 001 | valid on 'valid' subset | loss 9.5 | num_updates 1
2021-01-01 12:00:00 | INFO | train_inner | {"epoch": 1, "update": 0.05, "loss": "2.0", "nll_loss": \
"9.1", "num_updates": "200", "lr": "5e-05", "gnorm": "1.5", "loss_scale": "128"}
"""
#: llm.c, ``train_gpt2.cu``, and what others print like it.
PLAIN = """\
number of parameters: 124.34M
step   100/19560 | loss 2.5 (+nanz)| norm 1.25 (+nanz)| lr 1e-04 | 3368.71 ms | 43.7% bf16 MFU
val loss 9.5
step   200 | loss: 2.0 | lr 5.0e-05 | norm: 1.5 | dt: 30.1ms | tok/sec: 1740.1
"""
#: torchtune, ``StdoutLogger`` and ``DiskLogger`` of training/metric_logging.py.
TORCHTUNE = """\
1|100|Loss: 2.5:  10%|# | 100/1000 [00:10<01:30,  1.1it/s]
Step 100 | loss:2.5 lr:0.0001 tokens_per_second_per_gpu:12.5 grad_norm:1.25
Step 200 | loss:2.0 lr:5e-05 tokens_per_second_per_gpu:12.5 grad_norm:1.5
"""
#: MMEngine, ``LogProcessor``: by iteration, and by epoch as MMDetection does.
OPENMMLAB = """\
2024/01/01 12:00:00 - mmengine - INFO - Iter(train) [  100/1000]  lr: 1.0e-04  eta: 0:10:00  \
time: 0.5  grad_norm: 1.25  loss: 2.5  loss_cls: 9.0
2024/01/01 12:00:00 - mmengine - INFO - Iter(val) [  100/1000]  loss: 9.1
2024/01/01 12:00:00 - mmengine - INFO - Iter(train) [ 200/1000]  lr: 5.0e-05  \
grad_norm: 1.5  loss: 2.0
"""
MMDETECTION = """\
2024/01/01 12:00:00 - mmengine - INFO - Epoch(train)  [1][ 50/100]  lr: 1.0000e-04  eta: 1 day, \
0:00:00  time: 0.5  data_time: 0.01  memory: 4000  grad_norm: 1.2500  loss: 2.5000  loss_cls: 1.2000
2024/01/01 12:00:00 - mmengine - INFO - Epoch(val) [1][ 50/100]  loss: 9.1
2024/01/01 12:00:00 - mmengine - INFO - Epoch(train)  [2][ 50/100]  lr: 5.0000e-05  eta: 0:10:00  \
time: 0.5  data_time: 0.01  memory: 4000  grad_norm: 1.5000  loss: 2.0000  loss_cls: 1.2000
"""
LOGS = {
    "Hugging Face": (HUGGING_FACE, [0, 1]),
    "Megatron": (MEGATRON, [100, 200]),
    "torchtitan": (TORCHTITAN, [100, 200]),
    "fairseq": (FAIRSEQ, [100, 200]),
    "plain": (PLAIN, [100, 200]),
    "torchtune": (TORCHTUNE, [100, 200]),
    "OpenMMLab": (OPENMMLAB, [100, 200]),
    "OpenMMLab by epoch": (MMDETECTION, [50, 150]),
}


def read(folder: Path, text: str) -> History:
    (folder / "train.log").write_text(text)
    return open_history(str(folder / "train.log"))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", LOGS)
def test_the_loss_the_norm_and_the_rate_are_found_in_what_loops_print(
    name: str, end: str, tmp_path: Path
) -> None:
    text, steps = LOGS[name]

    history = read(tmp_path, text.replace("\n", end))

    assert history.format == "log"
    assert history.steps.tolist() == steps
    assert history.layers == ()
    assert history.loss is not None
    assert history.total_l2 is not None
    assert history.loss.tolist() == [2.5, 2.0]
    assert history.total_l2.tolist() == [1.25, 1.5]
    if name != "torchtitan":
        assert history.lr is not None
        np.testing.assert_allclose(history.lr[:, 0], [1e-4, 5e-5])


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("iter 100: loss 2.5, time 123.45ms", {"step": 100, "loss": 2.5}),
        ("INFO:root:step=10 loss=2.5 grad_norm=0.5", {"step": 10, "loss": 2.5, "grad_norm": 0.5}),
        ("Step 5: train/loss = 2.5, train/grad_norm = 2", {"step": 5, "loss": 2.5, "grad_norm": 2}),
        ("step: 1,000 loss: 2.5", {"step": 1000, "loss": 2.5}),
        ("{'loss': 2.5, 'grad_norm': np.float64(0.5)}", {"loss": 2.5, "grad_norm": 0.5}),
        ("{'loss': tensor(2.5, device='cuda:0')}", {"loss": 2.5}),
        ('[r0] {"step": 10, "loss": 2.5}', {"step": 10, "loss": 2.5}),
        ("step 5 loss inf norm -inf", {"step": 5, "loss": np.inf, "grad_norm": -np.inf}),
        ("step 5 loss infinity lr 1e-4", {"step": 5, "loss": np.inf, "lr": 1e-4}),
        ("loss 2.5", None), ("test step 10: loss 2.5", None),
        ("sec_per_step: 0.5 loss: 2.5", None), ("step 10: aux loss 2.5", {"step": 10}),
        ("step 10: val_loss=2.5", {"step": 10}), ("at 12:30:11 the loss 12:30", None),
    ],
)  # fmt: skip
def test_a_line_says_what_a_person_would_read_in_it(
    line: str, values: dict[str, float] | None
) -> None:
    said = said_by(line)

    assert (said and said.values) == values


#: What programs print that count within epochs: lines, their steps and their losses.
WITHIN_EPOCHS = {
    # imagenet of pytorch/examples counts epochs from 0
    "imagenet": (
        "Epoch: [{0}][  10/5005]\tTime  0.512 ( 1.204)\tData  0.001 ( 0.100)\tLoss {1}e+00 "
        "(7.0e+00)\tAcc@1   0.00 (  0.10)",
        [0, 1], [10, 5015],
    ),
    # mnist, which counts from 1 and in images
    "mnist": ("Train Epoch: {0} [640/60000 (1%)]\tLoss: {1}00000", [1, 2], [640, 60640]),
    # word_language_model
    "word language model": (
        "| epoch   {0} |   200/ 2983 batches | lr 20.00 | ms/batch 10.12 | loss  {1} | ppl   9.00",
        [1, 2], [200, 3183],
    ),
    # timm, train.py, before and after it told the updates
    "timm": (
        "Train: {0} [  50/1251 (  4%)]  Loss: {1} (6.94)  Time: 0.413s,  620.41/s  (0.5s,  500.0/s)"
        "  LR: 1.000e-06  Data: 0.010 (0.020)",
        [0, 1], [50, 1301],
    ),
    "timm, with updates": (
        "Train: {0} [  50/1251 (  4%)]  Updates: {0}301  Loss: {1} (6.9)  Time: 0.413s,  620.41/s",
        [1, 2], [1301, 2301],
    ),
    # torchvision's references and what grew from them (DeiT, MAE, DINO)
    "torchvision": (
        "Epoch: [{0}]  [ 100/5004]  eta: 0:10:00  lr: 0.000100  loss: {1} (6.95)  time: 0.3  "
        "data: 0.1  max mem: 4000",
        [0, 1], [100, 5104],
    ),
    "Swin": (
        "[2024-01-01 12:00:00 swin] (main.py 250): INFO Train: [{0}/300][100/1251]\teta 0:10:00 lr "
        "0.000100\t wd 0.0500\ttime 0.3 (0.3)\tloss {1} (6.95)\tgrad_norm 1.5 (1.7)\tloss_scale "
        "65536.0000 (65536.0000)\tmem 4000MB",
        [0, 1], [100, 1351],
    ),
    "tutorials": ("Epoch [{0}/5], Step [100/600], Loss: {1}", [1, 2], [100, 700]),
    # the classifier of PyTorch's tutorials, which does not say how long an epoch is
    "CIFAR10": ("[{0},  2000] loss: {1}", [1, 2], [2000, 4000]),
    # its quickstart, transfer learning, and Keras's ProgbarLogger write the epoch above
    "quickstart": (
        "Epoch {0}\n-------------------------------\nloss: {1}03494  [   64/60000]\nTest Error: \n"
        " Accuracy: 64.4%, Avg loss: 1.089713 \n", [1, 2], [64, 60064],
    ),
    "transfer learning": (
        "Epoch {0}/24\n----------\ntrain Loss: {1} Acc: 0.7582\nval Loss: 9.2567 Acc: 0.8954",
        [0, 1, 2], [0, 1, 2],
    ),
    "Keras": (
        "Epoch {0}/10\n469/469 - 1s - 2ms/step - accuracy: 0.9012 - loss: {1}000 - val_accuracy: "
        "0.9 - val_loss: 9.3000", [1, 2], [469, 938],
    ),
    "Keras's bar": (
        "Epoch {0}/10\n\b\b\b\r\x1b[1m100/469\x1b[0m \x1b[32m━━━━\x1b[0m\x1b[37m━━\x1b[0m \x1b[1m1s"
        "\x1b[0m 3ms/step - accuracy: 0.5000 - loss: {1}", [1, 2], [100, 569],
    ),
    # Lightning's two bars; the richer one counts 0/9 to 9/9
    "Lightning": (
        "Epoch {0}:  10%|#    | 10/100 [00:00<00:09, 52.10it/s, v_num=0, train_loss={1}00]",
        [0, 1], [10, 110],
    ),
    "Lightning's rich bar": (
        "Epoch {0}/9 ━━━━━╸━━ 10/100 0:00:01 • 0:00:02 50.00it/s v_num: 0.000 train_loss: {1}00",
        [0, 1], [10, 110],
    ),
    # what people write themselves
    "an epoch a line": (
        "Epoch {0}/3, Train Loss: {1}, Val Loss: 9.6\nSaved model", [1, 2, 3], [1, 2, 3],
    ),
    "an epoch a line, by keys": (
        "12:00:00 | epoch={0} train_loss={1} valid_loss=9.6 lr=0.001", [1, 2, 3], [1, 2, 3],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WITHIN_EPOCHS)
def test_loops_that_count_within_epochs_have_steps(name: str, tmp_path: Path) -> None:
    line, epochs, steps = WITHIN_EPOCHS[name]
    losses = [2.5 - epoch / 2 for epoch in epochs]

    lines = [line.format(*row) + "\n" for row in zip(epochs, losses, strict=True)]
    history = read(tmp_path, "".join(lines))

    assert history.steps.tolist() == steps
    assert history.loss is not None
    assert history.loss.tolist() == pytest.approx(losses, abs=0.01)


def test_a_bar_of_the_whole_run_counts_steps(tmp_path: Path) -> None:
    """That of diffusers' scripts: ``set_postfix(step_loss=…, lr=…)``."""
    bar = "Steps:  10%|#    | {0}/1000 [00:50<07:30,  2.00it/s, lr=1e-5, step_loss={1}]"

    history = read(tmp_path, "\r".join(bar.format(n, 1 / n) for n in (100, 101)))

    assert history.steps.tolist() == [100, 101]
    assert history.loss is not None
    assert history.loss.tolist() == [0.01, 1 / 101]


def test_the_loss_of_training_beside_that_of_validation_is_read(tmp_path: Path) -> None:
    """litgpt prints both on every line, the latter as n/a until it is known."""
    line = (
        "Epoch 1 | iter {0} step {1} | loss train: {2}, val: {3} | iter time: 10.12 ms (step) "
        "remaining time: 1:00:00\n"
    )
    rows = [(4, 1, 2.5, "n/a"), (8, 2, 2.0, "n/a"), (12, 3, 1.5, "9.300")]

    history = read(tmp_path, "".join(line.format(*row) for row in rows) + "iter 12: val loss 9.3\n")

    assert history.steps.tolist() == [1, 2, 3]
    assert history.loss is not None
    assert history.loss.tolist() == [2.5, 2.0, 1.5]
    assert history.notes == (ONLY_LOSS,)
    with_norm = "step 1 loss 2.0 grad_norm 1.0\nstep 2 loss 1.0 grad_norm 1.0\n"
    assert read(tmp_path, with_norm).notes == (ONLY_TOTAL,)


def test_the_commonest_kind_of_lines_is_that_of_a_log(tmp_path: Path) -> None:
    """nanoGPT prints a mean over many batches now and then, others that of each epoch."""
    nano = "step 0: train loss 9.0, val loss 9.1\n" + "".join(
        f"iter {n}: loss {x}, time 123.45ms, mfu 12.00%\n" for n, x in ((0, 2.5), (10, 2.0))
    )
    epochs = "".join(
        f"step {n} loss {x}\nstep {n + 1} loss {x}\nEpoch {n} done, loss 9.0\n"
        for n, x in ((0, 2.5), (10, 2.0), (20, 1.5))
    )

    for text, losses in ((nano, [2.5, 2.0]), (epochs, [2.5, 2.5, 2.0, 2.0, 1.5, 1.5])):
        history = read(tmp_path, text)
        assert history.loss is not None
        assert history.loss.tolist() == losses


def test_steps_that_are_epochs_are_said_to_be(tmp_path: Path) -> None:
    text = "".join(f"[Epoch {n}] loss: 0.5\n" for n in range(3))

    assert "steps are epochs" in " ".join(read(tmp_path, text).notes)


def test_one_mention_of_an_epochs_loss_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("In epoch 3 we saw a loss: 2.5 and stopped.\n" * 2)

    with pytest.raises(InputError, match="is not a known history"):
        open_history(str(tmp_path / "notes.txt"))


def test_what_is_not_finite_is_data_unless_the_step_was_skipped(tmp_path: Path) -> None:
    line = "iteration {0}/ 50 | lm loss: 2.0 | loss scale: 1.0 | grad norm: {1} | number of skipped iterations: {2} |\n"  # noqa: E501
    rows = [(1, "1.0", 0), (2, "inf", 1), (3, "1.0", 1), (4, "nan", 0)]

    history = read(tmp_path, "".join(line.format(*row) for row in rows))

    assert history.skipped is not None
    assert history.skipped.tolist() == [0, 1, 0, 0]
    assert history.total_l2 is not None
    assert np.isnan(history.total_l2[3])


@pytest.mark.parametrize("total", [True, False])
def test_a_run_known_by_its_log_alone_is_judged_by_its_loss(total: bool, tmp_path: Path) -> None:
    def log(after: float) -> str:
        norm = "'grad_norm': 1.0, " if total else ""
        losses = [2 / (1 + t / 10) if t < 60 else after * (1 + t % 3 / 9) for t in range(100)]
        return "".join(f"{{'loss': {x}, {norm}'epoch': {t}}}\n" for t, x in enumerate(losses))

    for after, code, severity in (
        (0.2, 0, []),
        (20.0, 1, ["high"]),
        (float("nan"), 1, ["critical"]),
    ):
        (tmp_path / "train.log").write_text("starting\n" + log(after))
        report = analyze_flow(tmp_path / "train.log")
        assert report.gate.exit_code == code
        if not total:
            counted = report.coverage
            assert (counted.unit, counted.total) == ("losses", 100)
            assert counted.analyzed == (100 if code == 0 or after == 20.0 else 60)
        assert [f.severity for f in report.findings if f.name == "diverged"] == severity


@pytest.mark.parametrize("mark", [": ", "=", " "])
def test_nan_is_found_whatever_stands_before_it(mark: str, tmp_path: Path) -> None:
    values = [2.0, float("nan"), float("inf")]
    rows = [f"step {t} loss{mark}{x} grad_norm{mark}{x}\n" for t, x in enumerate(values)]

    history = read(tmp_path, "".join(rows))

    assert history.loss is not None
    assert history.total_l2 is not None
    np.testing.assert_array_equal(history.loss, values)
    np.testing.assert_array_equal(history.total_l2, values)
    assert "F101" in {f.rule for f in analyze_flow(tmp_path / "train.log").findings}


def test_tables_and_json_are_not_taken_for_logs(tmp_path: Path) -> None:
    rows = [{"step": t, "loss": 1.0, "grad_norm": 2.0} for t in (1, 2)]
    (tmp_path / "a").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b").write_text(json.dumps({"log_history": rows}, indent=1))
    (tmp_path / "c").write_text("step\tloss\tgrad_norm\n1\t1.0\t2.0\n")
    (tmp_path / "d").write_text("step,layer,value\n1,loss 3,2.0\n")

    formats = [open_history(str(tmp_path / name)).format for name in "abcd"]

    assert formats == ["jsonl", "trainer_state", "csv", "csv"]


def test_prose_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("At step 10 we saw a loss and the norm was high.\n" * 9)

    with pytest.raises(InputError, match="is not a known history"):
        open_history(str(tmp_path / "notes.txt"))


def test_a_long_line_takes_no_long_time(tmp_path: Path) -> None:
    hostile = "loss " + "a " * 400_000 + "." * 400_000 + "step " * 100_000 + "\n"

    history = read(tmp_path, hostile * 2 + "step 1 loss 2.0\n")

    assert history.steps.tolist() == [1]


@given(text=st.text(alphabet="step los:=,|[]{}'\"0123456789.-enaif\t\n\r\x1b[m", max_size=200))
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_text_is_a_log_or_an_error_a_person_can_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.log").write_text("step 1 loss 2.0\n" + text)
    with suppress(InputError, UsageError):
        history = open_history(str(tmp_path / "t.log"))
        assert history.l2.shape == history.status.shape == history.shape
        assert np.all(np.diff(history.steps) > 0)
