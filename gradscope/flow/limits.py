"""Every limit that more than one part of ``flow`` reads: named here, shown by the rules.

These decide what is seen at all. What is seen is judged by the rules, whose own limits are the
keyword parameters in their signatures. Nothing here imports NumPy: rules are listed without it.
"""

from __future__ import annotations

import math

#: Fewest records of a statistic of one window, and of a trend.
MIN_WINDOW = 5
MIN_TREND = 8
#: Gaps of this many records do not end a stretch, and shorter stretches are not a region.
BRIDGE = 2
SHORTEST = 3
#: Fewest records of a dead zone, and the share of zero elements from which a gradient is dead.
SHORTEST_ZONE = 5
ZERO_SHARE = 0.999

#: Decades below the loss side of its kind at which a layer vanishes (AutoTrainer's 1e-3, Zhang et
#: al. 2021), and below its own earlier level while the network fell less than ``TOGETHER_DECADES``.
#: Both hold on until ``LEAVE_DECADES`` inside.
DEPTH_DECADES = 3.0
FALL_DECADES = 3.0
TOGETHER_DECADES = 1.0
LEAVE_DECADES = 0.5

#: Update ratios (norm of a step's change over that of the weights): a layer stands still, moves,
#: is pushed (neurolens's upper band), and is pushed hard (traintools).
STANDSTILL = 1e-6
MOVING = 1e-5
UPDATE_WARN = 0.05
UPDATE_HIGH = 0.1
UPDATE_WILD = 0.5
#: Share of its full step below which epsilon holds an Adam-like optimizer back.
ATTENUATED = 0.5

#: Times the records before: the least spike, and the levels of severity of seed 002.
SPIKE_RATIO = 4.0
MODERATE_RATIO = 10.0
SEVERE_RATIO = 50.0
CRITICAL_RATIO = 100.0
SPIKE_Z = 6.0
#: Least spread of log norms, in nats: a deterministic series has none.
SPREAD_FLOOR = 0.05
#: Growth within one window, times the layer's own level after warm-up, and times the loss side's
#: RMS (AutoTrainer).
GROWTH_FACTOR = 4.0
LEVEL_RATIO = 10.0
DEPTH_RATIO = 70.0

#: A whole stack vanishes or explodes: a factor of three a layer, which a line explains.
SYSTEMIC_NATS = math.log(3)
SYSTEMIC_FIT = 0.8

#: Decades below both neighbours from which a layer is a bottleneck, and that make a full one.
BOTTLENECK_FROM = 1.0
BOTTLENECK_DECADES = 3.0

#: Robust deviations of the loss, share of what had been gained, and multiple of the best level from
#: which a loss has risen for good.
LOSS_SPREADS = 8.0
LOSS_LOST = 0.1
LOSS_LEVEL = 3.0
#: Cosine of a step to the negative gradient below which it climbs.
CLIMBING = -0.5
#: Share of its greatest value below which a learning rate was scheduled away.
RATE_GONE = 1e-3
