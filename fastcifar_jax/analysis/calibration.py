"""Accuracy, loss and calibration of the logits of a test set."""

import numpy as np
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score

BINS = 15  # of the expected calibration error


def measure(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy as a fraction, mean cross-entropy in nats, and expected calibration error as a fraction.

    Args:
      logits: float32 `[n, classes]`.
      labels: integers `[n]`.
    """
    log_p = log_softmax(np.asarray(logits, np.float64), axis=-1)
    predicted = log_p.argmax(-1)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "loss": float(-log_p[np.arange(len(labels)), labels].mean()),
        "calibration error": calibration_error(np.exp(log_p.max(-1)), predicted == labels),
    }


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: |accuracy - mean confidence| of bins of confidence, averaged over the images.

    The bins have equal widths; bin m of M is ((m - 1) / M, m / M] (Guo et al. 2017, "On calibration of modern neural
    networks", section 2; Naeini et al. 2015).

    Args:
      confidence: probability of the predicted class of each image.
      correct: whether that class is the right one.
      bins: number of bins.
    """
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(index, correct - confidence, bins)
    return float(np.abs(gaps).sum() / len(confidence))
