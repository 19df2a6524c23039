"""How certain a figure is: 95 % confidence intervals and paired tests.

low, high = wilson(rate=0.62, count=1346)             # (0.594, 0.646)
p_value = mcnemar(only_first=12, only_second=31)      # 0.005
"""

import math
from collections.abc import Sequence

Z = 1.959964  # 95 % of a normal distribution lie between -Z and Z
Interval = tuple[float, float]


def wilson(rate: float, count: int) -> Interval:
    """Wilson's score interval (1927) of a success rate in `count` independent trials.

    It stays between 0 and 1, and has a width even if all trials succeed.
    """
    if count == 0:
        return 0.0, 1.0
    center = rate + Z**2 / (2 * count)
    half = Z * math.sqrt(rate * (1 - rate) / count + Z**2 / (4 * count**2))
    scale = 1 + Z**2 / count
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


def macro_interval(parts: Sequence[tuple[float, int]]) -> Interval:
    """Normal interval of the unweighted mean of success rates, from the variance in each part.

    parts: the (rate, count) of each. The variance is that of the rate (successes + 1) /
    (count + 2): a small part in which all trials succeed is not certain.
    """
    mean = sum(rate for rate, _ in parts) / len(parts)
    variance = 0.0
    for rate, count in parts:
        smoothed = (rate * count + 1) / (count + 2)
        variance += smoothed * (1 - smoothed) / count
    half = Z * math.sqrt(variance) / len(parts)
    return max(0.0, mean - half), min(1.0, mean + half)


def mean_interval(values: Sequence[float], least: float, most: float) -> tuple[float, float, float]:
    """(mean, low, high): the mean of values between `least` and `most`, and its normal interval.

    A single value has no variance. Its interval is the full range.
    """
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, least, most
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = Z * math.sqrt(variance / len(values))
    return mean, max(least, mean - half), min(most, mean + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test.

    Two models answer the same questions. only_first, only_second: how many questions only that
    model answers right.
    """
    total, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(total, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)
