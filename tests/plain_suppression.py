"""Suppression and voting as one would write them first: what the vectorised forms must equal."""

import math


def slow_iou(a, b, extra=0.0):
    overlap = max(min(a[1], b[1]) - max(a[0], b[0]), 0.0)
    union = (a[1] - a[0] + extra) + (b[1] - b[0] + extra) - overlap
    return overlap / union if union > 0 else 0.0


def slow_suppress(moments, scores, keep, kind, sigma, iou_threshold, min_score):
    """The textbook loop: take the best, weaken or drop its neighbours, repeat."""
    left = list(zip(scores, moments, strict=True))
    if kind == "hard":
        left = [(score, moment) for score, moment in left if score > min_score]
    picked = []
    while left and len(picked) < keep:
        best = max(left, key=lambda pair: pair[0])
        left.remove(best)
        picked.append(best)
        survivors = []
        for score, moment in left:
            overlap = slow_iou(best[1], moment, 1e-6)
            if kind == "soft":
                score *= math.exp(-(overlap**2) / sigma)
                if score >= min_score:
                    survivors.append((score, moment))
            elif overlap < iou_threshold:
                survivors.append((score, moment))
        left = survivors
    return [moment for _, moment in picked], [score for score, _ in picked]


def slow_vote(picked, moments, scores, threshold):
    voted = []
    for moment in picked:
        voters = [
            (score, other)
            for score, other in zip(scores, moments, strict=True)
            if slow_iou(moment, other) >= threshold
        ]
        total = sum(score for score, _ in voters)
        voted.append([sum(s * m[end] for s, m in voters) / total for end in (0, 1)])
    return voted
