"""The rules about two checkpoints, by theme; importing this package registers them."""

from gradscope.drift.rules import changes as changes
from gradscope.drift.rules import expected as expected
