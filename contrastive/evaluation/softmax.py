"""L2-regularised softmax regression, solved to the optimum for many strengths on the same features.

Shapes: N samples, D features, K classes, R <= min(N, D) directions in which the features vary.

Objective, as scikit-learn's `LogisticRegression`: C * sum of cross-entropies + 1/2 |W|^2, the intercept free.

What makes it quick, without moving the optimum: features are centred (the free intercept absorbs it) and
rotated onto their principal directions once. There the Hessian of the cross-entropy is nearly diagonal, at
most 1/2 (I - 11'/K) x X'X (Böhning 1992, "Multinomial logistic regression algorithm"), so that scaling each
direction by 1/sqrt(curvature + penalty) leaves a well-conditioned problem for L-BFGS at every strength. The
curvature per unit of variance is taken from the starting point: the mean of p(1 - p), which shrinks as the
fit gets closer; Böhning's constant bound in its place took 1.5 times the iterations on Fashion-MNIST pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

Array = NDArray[np.float64]


class SoftmaxRegression:
    """The problem on one set of features; `solve` it for any strength, each from where the last one ended.

    features_ND: finite; target_N: int in 0 … classes-1.
    """

    def __init__(self, features_ND: NDArray[np.floating], target_N: NDArray[np.int64], classes: int) -> None:
        features = np.asarray(features_ND, dtype=np.float64)
        self.mean_D = features.mean(axis=0)
        centred = features - self.mean_D
        # Eigenvectors of the smaller of X'X and XX'. Null directions are dropped: the optimum has no weight
        # there.
        if centred.shape[1] <= centred.shape[0]:
            power, basis = np.linalg.eigh(centred.T @ centred)
        else:
            power, left = np.linalg.eigh(centred @ centred.T)
            basis = centred.T @ left / np.sqrt(np.maximum(power, np.finfo(float).tiny))
        keep = power > power.max(initial=0.0) * max(centred.shape) * np.finfo(float).eps
        self.power_R, self.basis_DR = power[keep], basis[:, keep]
        self.rotated_NR = centred @ self.basis_DR
        self.target_N, self.classes = target_N, classes
        self.weights_RK: Array = np.zeros((len(self.power_R), classes))
        self.intercept_K: Array = np.zeros(classes)

    def start_at(self, coef_KD: Array, intercept_K: Array) -> None:
        """Let the next `solve` start from this solution, which may be one to other samples."""
        self.weights_RK = self.basis_DR.T @ coef_KD.T
        self.intercept_K = intercept_K + coef_KD @ self.mean_D

    def solve(
        self, strength: float, *, tolerance: float, max_iter: int, dtype: type[np.floating] = np.float64
    ) -> tuple[Array, Array]:
        """`(coef (K, D), intercept (K,))` at C = strength, starting from the last solution.

        tolerance: stop when an iteration lowers the objective, per sample, by less than this share of it.
        dtype: of the two matrix products, where the time goes: float32 halves it and is good to about 1e-6.
        """
        samples, directions = self.rotated_NR.shape
        start_NK = softmax(self.rotated_NR @ self.weights_RK + self.intercept_K, axis=1)
        curvature = max(float((start_NK * (1 - start_NK)).mean()), 1e-4)
        scale_R = 1 / np.sqrt(curvature * self.power_R + 1 / strength)
        scaled_NR = (self.rotated_NR * scale_R).astype(dtype)
        intercept_scale = 1 / np.sqrt(curvature * samples)
        rows = np.arange(samples)

        def objective(flat: Array) -> tuple[float, Array]:
            point = flat.reshape(directions + 1, self.classes)
            logits_NK = (scaled_NR @ point[:-1].astype(dtype)).astype(np.float64) + intercept_scale * point[-1]
            log_sum = logsumexp(logits_NK, axis=1, keepdims=True)
            loss = (log_sum[:, 0] - logits_NK[rows, self.target_N]).sum()
            residual_NK = np.exp(logits_NK - log_sum)
            residual_NK[rows, self.target_N] -= 1
            weights = scale_R[:, None] * point[:-1]
            gradient = np.empty_like(point)
            gradient[:-1] = scaled_NR.T @ residual_NK.astype(dtype) + scale_R[:, None] * weights / strength
            gradient[-1] = intercept_scale * residual_NK.sum(axis=0)
            value = loss + 0.5 * (weights**2).sum() / strength
            return value / samples, gradient.ravel() / samples

        start = np.vstack([self.weights_RK / scale_R[:, None], self.intercept_K / intercept_scale])
        options = {"maxiter": max_iter, "maxfun": 2 * max_iter, "ftol": tolerance, "gtol": 0.0, "maxcor": 20}
        found = minimize(objective, start.ravel(), jac=True, method="L-BFGS-B", options=options)
        point = found.x.reshape(directions + 1, self.classes)
        self.weights_RK = scale_R[:, None] * point[:-1]
        self.intercept_K = intercept_scale * point[-1]
        coef_KD = (self.basis_DR @ self.weights_RK).T
        intercept = self.intercept_K - coef_KD @ self.mean_D
        return coef_KD, intercept - intercept.mean()  # a constant on every class changes no probability
