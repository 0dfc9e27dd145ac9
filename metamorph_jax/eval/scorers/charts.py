"""ChartQA's relaxed accuracy: numbers may be 5 % off."""

TOLERANCE = 0.05


def relaxed_match(answer: str, reference: str, tolerance: float = TOLERANCE) -> bool:
    """Whether a number is within 5 % of a reference other than 0, or the texts are equal.

    A final "%" divides by 100, so "50%" is not "50". Commas and units are not removed; years get
    the same 5 %. Case doesn't matter in texts."""
    value, truth = _number(answer), _number(reference)
    if value is not None and truth:
        return abs(value - truth) / abs(truth) <= tolerance
    return answer.lower() == reference.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
