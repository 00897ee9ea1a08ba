"""Which members learn alike: clustering of updates in product space, without forming a product.

Similarity is the cosine of the whole updates, ``Σ_m <P_i, P_j>`` over modules, each term from the factors in
O((d_in + d_out) r²). Average linkage; the number of clusters is the cut with the best mean silhouette (Rousseeuw 1987).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import squareform

from lorafleet.adapters import LoraAdapter
from lorafleet.adapters.factor_space import inner

Matrix = npt.NDArray[np.float64]

SHARED = "shared"
# Below this mean silhouette a split is noise: everybody then learns one expert.
MIN_SILHOUETTE = 0.05


def similarity(adapters: Sequence[LoraAdapter]) -> Matrix:
    """Cosines of the updates' products, ``[n, n]``; 0 for a vanishing update."""
    n = len(adapters)
    gram = np.zeros((n, n))
    for i in range(n):
        for j in range(i, n):
            paths = adapters[i].modules.keys() & adapters[j].modules.keys()
            pairs = ((adapters[i].modules[p], adapters[j].modules[p]) for p in sorted(paths))
            gram[i, j] = gram[j, i] = sum(float(inner(p, q)) for p, q in pairs)
    length = np.sqrt(np.clip(np.diag(gram), 0.0, None))
    scale = np.outer(length, length)
    cosine: Matrix = np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)
    return cosine


def silhouette(distance: Matrix, labels: npt.NDArray[np.int64]) -> float:
    """Mean silhouette of a labelling; a member alone in its cluster counts 0."""
    scores = []
    for i, label in enumerate(labels):
        own = labels == label
        if own.sum() == 1:
            scores.append(0.0)
            continue
        within = distance[i, own].sum() / (own.sum() - 1)
        nearest = min(distance[i, labels == other].mean() for other in set(labels.tolist()) - {label})
        scores.append(float((nearest - within) / max(nearest, within, 1e-12)))
    return float(np.mean(scores))


def partition(cosine: Matrix) -> list[int]:
    """A cluster number per member, counted from 0 in the order in which clusters first appear."""
    n = len(cosine)
    if n < 3:
        return [0] * n
    distance = np.clip(1.0 - cosine, 0.0, 2.0)
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform(distance, checks=False), method="average")
    best, best_score = np.zeros(n, dtype=np.int64), MIN_SILHOUETTE
    for count in range(2, n):
        labels = fcluster(tree, t=count, criterion="maxclust").astype(np.int64)
        if len(set(labels.tolist())) != count:
            continue
        score = silhouette(distance, labels)
        if score > best_score:
            best, best_score = labels, score
    seen: dict[int, int] = {}
    return [seen.setdefault(int(label), len(seen)) for label in best]


def assign(
    updates: Mapping[str, LoraAdapter],
    *,
    previous: Mapping[str, str],
    min_size: int,
    used: Collection[str] = (),
) -> dict[str, str]:
    """Member key → expert label. A cluster below ``min_size`` falls to the shared expert.

    Labels (``expert-1``, …) follow the members from round to round: clusters are matched to last round's labels by
    the number of members they have in common, and only an unmatched cluster opens a new label, one that is not in
    ``used`` either.
    """
    members = sorted(updates)
    numbers = partition(similarity([updates[m] for m in members]))
    groups: dict[int, list[str]] = {}
    for member, number in zip(members, numbers, strict=True):
        groups.setdefault(number, []).append(member)
    kept = [group for group in groups.values() if len(group) >= min_size]
    known = sorted({label for label in previous.values() if label != SHARED})
    labels: dict[int, str] = {}
    if kept and known:
        overlap = np.array([[sum(previous.get(m) == label for m in group) for label in known] for group in kept])
        for row, column in zip(*linear_sum_assignment(-overlap), strict=True):
            if overlap[row, column] > 0:
                labels[int(row)] = known[int(column)]
    taken = {int(label.rpartition("-")[2]) for label in {*known, *used} - {SHARED}}
    fresh = (number for number in range(1, len(kept) + len(taken) + 1) if number not in taken)
    result = dict.fromkeys(members, SHARED)
    for row, group in enumerate(kept):
        label = labels.get(row) or f"expert-{next(fresh)}"
        result |= dict.fromkeys(group, label)
    return result
