"""How sure a measured figure is: 95 % confidence intervals and paired tests.

low, high = wilson(rate=0.62, count=1346)             # (0.594, 0.646)
p_value = mcnemar(only_first=12, only_second=31)      # 0.005
"""

import math

Z = 1.959964  # between -Z and Z lie 95 % of a normal distribution


def wilson(rate, count):
    """Wilson's interval (low, high) of a share seen in `count` independent trials (1927).

    Never leaves 0 to 1, and has a width where all or none succeeded.
    """
    if count == 0:
        return 0.0, 1.0
    middle = rate + Z**2 / (2 * count)
    half = Z * math.sqrt(rate * (1 - rate) / count + Z**2 / (4 * count**2))
    scale = 1 + Z**2 / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def macro_interval(parts):
    """Interval of the plain mean of shares: normal, from the variance inside each part.

    parts: (share, count) of each. A share's variance is taken at (successes + 1) / (count + 2),
    so that a small part in which all succeeded does not pass for certain.
    """
    mean = sum(rate for rate, _ in parts) / len(parts)
    variance = 0.0
    for rate, count in parts:
        moderate = (rate * count + 1) / (count + 2)
        variance += moderate * (1 - moderate) / count
    half = Z * math.sqrt(variance) / len(parts)
    return max(0.0, mean - half), min(1.0, mean + half)


def mean_interval(values, least, most):
    """The mean of numbers and its normal interval: (mean, low, high), within what is possible.

    One value says nothing of the others: its interval is all that is possible.
    """
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, least, most
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = Z * math.sqrt(variance / len(values))
    return mean, max(least, mean - half), min(most, mean + half)


def mcnemar(only_first, only_second):
    """Two-sided p-value of McNemar's exact test, from the counts of what only one got right."""
    total, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(total, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)
