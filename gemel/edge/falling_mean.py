"""A sequential test of whether the mean of observations in [0, 1] has fallen below a level.

May be looked at after every observation, for as long as one likes: if every observation has a mean of at least the
level, given those before it, the probability that the test ever says otherwise is at most `alpha`.
"""

BETS = (0.05, 0.1, 0.2, 0.35, 0.6)  # shares of the largest bet that can never lose everything
PATIENCE = 500  # observations after which half of the first capital has been put in
LARGEST = 1000.0  # bet at level 1, where there is no largest one


class FallingMean:
    """Tests by betting (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", 2023).

    A gambler bets a share of a capital on each observation x to be below the level m: a bet b multiplies the capital
    by 1 + b (m - x), which is never negative for b up to 1 / (1 - m), and does not grow on average while the mean is at
    least m. So a capital that begins at 1 ever reaches 1 / alpha with a probability of at most alpha (Ville's
    inequality). Since the mean may fall at any time, and by any amount, the first capital is split: a part for each of
    BETS, and of these a part that is put in at each observation (a mixture over times of change, as in Shin,
    Ramdas and Rinaldo, "E-detectors", 2023). So a fall after a million observations is found nearly as soon as one at
    the beginning; parts that are not put in yet stay as they are.

    level: in [0, 1]; the mean is never said to be below 0. alpha: in (0, 1).
    """

    def __init__(self, level: float, alpha: float):
        if not 0 <= level <= 1 or not 0 < alpha < 1:
            raise ValueError(f"got level {level}, alpha {alpha}; allowed: level in [0, 1], alpha in (0, 1)")
        self.level, self.alpha = level, alpha
        largest = 1 / (1 - level) if level < 1 else LARGEST
        self.bets = [share * largest for share in BETS]
        self.capital = [0.0] * len(self.bets)
        self.count = 0

    def observe(self, value: float) -> bool:
        """Takes the next observation, in [0, 1]; whether the mean is below the level."""
        if not 0 <= value <= 1:
            raise ValueError(f"got the observation {value}; allowed: in [0, 1]")
        new = (_left(self.count) - _left(self.count + 1)) / len(self.bets)
        self.count += 1
        self.capital = [
            (held + new) * (1 + bet * (self.level - value)) for held, bet in zip(self.capital, self.bets, strict=True)
        ]
        return self.has_fallen

    @property
    def evidence(self) -> float:
        """The capital: 1 at the beginning; from 1 / alpha on the mean is said to have fallen."""
        return sum(self.capital) + _left(self.count)

    @property
    def has_fallen(self) -> bool:
        """Whether the mean is said to be below the level."""
        return self.evidence >= 1 / self.alpha


def _left(count: int) -> float:
    """The share of the first capital that is not put in after so many observations: 1, falling towards 0."""
    return PATIENCE / (PATIENCE + count)
