"""Distributions of times, and streams of draws from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from codedinvnet.common.config import Section

CHUNK = 8192
"""Draws that a stream makes at once."""
LARGEST_DEVIATION = 20.0
"""Of a lognormal's logarithm; beyond it no float holds the mean."""
Time = Annotated[float, Field(ge=0)]


class Distribution(Section):
    """A distribution of times, in ms; a superset of the delays of a faults file.

    `empirical` is what was measured: draws are quantiles of the values, interpolated between
    neighbours, so that a sample and a list of evenly spaced quantiles mean the same. Nothing is
    drawn beyond the largest value.
    """

    distribution: Literal["constant", "exponential", "lognormal", "pareto", "empirical"] = (
        "constant"
    )
    ms: Time = 0.0
    """The time itself, the mean, the median (lognormal), or the least time (pareto)."""
    shape: Annotated[float, Field(gt=0)] = 1.5
    """Pareto: the tail's exponent; lognormal: the standard deviation of the logarithm."""
    plus_ms: Time = 0.0
    """Added to every draw."""
    most_ms: Annotated[float, Field(gt=0)] | None = None
    """No draw is larger."""
    values_ms: tuple[Time, ...] = ()
    """Of an empirical distribution."""
    shares: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()
    """Of an empirical distribution: which quantiles the values are, from 0 to 1; without them
    they are evenly spaced."""

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, raw: Any) -> Any:
        """Take a plain number as a constant time."""
        is_number = isinstance(raw, (int, float)) and not isinstance(raw, bool)
        return {"ms": raw} if is_number else raw

    @model_validator(mode="after")
    def _has_values(self) -> Distribution:
        if self.distribution == "lognormal" and self.shape > LARGEST_DEVIATION:
            raise ValueError(f"shape of a lognormal must be at most {LARGEST_DEVIATION:g}")
        if (self.distribution == "empirical") != bool(self.values_ms):
            raise ValueError("an empirical distribution has values_ms; no other has")
        if self.shares:
            rising = all(a < b for a, b in itertools.pairwise(self.shares))
            whole = (self.shares[0], self.shares[-1]) == (0.0, 1.0)
            if len(self.shares) != len(self.values_ms) or not (rising and whole):
                raise ValueError("shares must rise from 0 to 1, one for each of values_ms")
        return self

    def _quantiles(self) -> tuple[np.ndarray, np.ndarray]:
        """Return shares (n,) and the values (n,) there, of an empirical distribution."""
        values = np.sort(np.asarray(self.values_ms))
        return np.asarray(self.shares or np.linspace(0, 1, len(values))), values

    @property
    def mean_ms(self) -> float:
        """The mean; infinite for a Pareto tail with an exponent of at most 1."""
        if self.most_ms is not None:
            return self.model_copy(update={"most_ms": None}).mean_within(self.most_ms)
        if self.distribution == "empirical":
            shares, values = self._quantiles()  # of the piecewise linear quantile function
            between = (values[1:] + values[:-1]) / 2
            mean = float(between @ np.diff(shares)) if len(values) > 1 else values[0]
        elif self.distribution == "lognormal":
            mean = self.ms * math.exp(self.shape**2 / 2)
        elif self.distribution == "pareto":
            mean = self.ms * self.shape / (self.shape - 1) if self.shape > 1 else math.inf
        else:
            mean = self.ms
        return float(mean) + self.plus_ms

    def mean_within(self, limit_ms: float) -> float:
        """Return the mean of times that end at a limit, in ms; by draws, the same ones always."""
        draws = 1000 * self.draw(np.random.default_rng(0), 10 * CHUNK)
        return float(np.minimum(draws, limit_ms).mean())

    def draw(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """Return draws (count,) in seconds."""
        if self.distribution == "exponential":
            times = self.ms * generator.standard_exponential(count)
        elif self.distribution == "lognormal":
            times = self.ms * np.exp(self.shape * generator.standard_normal(count))
        elif self.distribution == "pareto":
            times = self.ms * (1 + generator.pareto(self.shape, count))
        elif self.distribution == "empirical":
            times = np.interp(generator.random(count), *self._quantiles())
        else:
            times = np.full(count, self.ms)
        times = times + self.plus_ms
        return (times if self.most_ms is None else np.minimum(times, self.most_ms)) / 1000

    def stream(self, generator: np.random.Generator) -> Iterator[float]:
        """Yield draws in seconds, without end."""
        while True:
            yield from self.draw(generator, CHUNK).tolist()


def uniforms(generator: np.random.Generator) -> Iterator[float]:
    """Yield numbers in 0..1, without end."""
    while True:
        yield from generator.random(CHUNK).tolist()
