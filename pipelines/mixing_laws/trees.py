"""Gradient-boosted regression trees over the shares, as RegMix fits them (2407.01492, section 3.2).

RegMix uses LightGBM; this is scikit-learn's histogram gradient boosting with its squared error, without early stopping. Trees
need hundreds of proxy runs and say nothing beyond the shares they saw: a cross-check of the exponential law.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from pipelines.mixing_laws import FittedLaw, MixingLaw, Observations


class Trees(MixingLaw):
    """Histogram gradient boosting."""

    reads: ClassVar[frozenset[str]] = frozenset({"shares"})
    min_points: ClassVar[int] = 30

    num_trees: int = Field(default=300, ge=1)
    """Boosting steps."""
    learning_rate: float = Field(default=0.05, gt=0.0)
    """Weight of each tree."""
    num_leaves: int = Field(default=15, ge=2)
    """Leaves of a tree at most."""
    min_leaf: int = Field(default=5, ge=1)
    """Measurements in a leaf at least."""

    def fit(self, observed: Observations) -> FittedLaw:
        """Fit in one thread, which is faster for tables this small."""
        from sklearn.ensemble import HistGradientBoostingRegressor
        from threadpoolctl import threadpool_limits

        model = HistGradientBoostingRegressor(
            max_iter=self.num_trees,
            learning_rate=self.learning_rate,
            max_leaf_nodes=self.num_leaves,
            min_samples_leaf=self.min_leaf,
            early_stopping=False,
            random_state=0,
        )
        with threadpool_limits(1):
            model.fit(observed.shares, observed.losses)

        def predict(shares: np.ndarray, _tokens: np.ndarray) -> np.ndarray:
            return model.predict(shares)

        return FittedLaw(predict, {"num_trees": float(self.num_trees), "learning_rate": self.learning_rate})
