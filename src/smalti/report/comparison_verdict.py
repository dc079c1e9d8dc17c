"""What a comparison shows, in sentences: gains from training, then differences to the first arm."""

from collections.abc import Sequence

from smalti.comparison.outcome import Comparison
from smalti.evaluation.paired import NO_DIFFERENCE, Row, gain_cells, table_cells
from smalti.report.parts import Kind


def sentences(comparison: Comparison) -> tuple[Kind, list[str]]:
    """What the scores show: ``better``, ``same``, ``worse`` or ``unknown``, and a few sentences for each arm.

    First the gains of trained arms over their own networks before training, then the differences to the first arm. The
    kind is that of the gains where arms were trained, else that of the differences: ``better`` if some arm is better in
    some evaluation, ``worse`` if some are only worse.
    """
    first = next(iter(comparison.plan.arms))
    headlines = [row for row in comparison.rows if row.is_headline]
    texts = [text for arm in comparison.plan.arms for text in _gains(arm, [row for row in headlines if row.arm == arm])]
    words: set[str] = set()
    gained = {row.gain_verdict for row in headlines if row.gain is not None}
    for arm in comparison.plan.arms:
        if arm in comparison.failures:
            done = any(row.arm == arm for row in headlines)
            part = " at some of its seeds; what follows is from the others" if done else " and has no results"
            texts.append(f"{arm} failed{part}: {comparison.failures[arm]}")
        by_word: dict[str, list[str]] = {}
        for row in headlines:
            if row.arm == arm and row.verdict and row.difference is not None:
                by_word.setdefault(row.verdict, []).append(f"{_title(row)} ({_gap(row)})")
                words.add(row.verdict)
        for word, where in by_word.items():
            texts.append(_sentence(arm, first, word, where))
    if not any(row.difference for row in headlines):
        alone = "it is the only arm with results" if len(comparison.arms) == 1 else "it has no results"
        texts.append(f"Nothing can be compared with {first}, the first arm: {alone}.")
    words = gained or words
    kind: Kind = "same" if NO_DIFFERENCE in words else "unknown"
    kind = "better" if "better" in words else "worse" if "worse" in words else kind
    return kind, texts


def _gains(arm: str, rows: Sequence[Row]) -> list[str]:
    """One sentence for each verdict on the gain from training."""
    by_word: dict[str, list[str]] = {}
    for row in rows:
        if row.gain is not None:
            by_word.setdefault(row.gain_verdict, []).append(f"{_title(row)} ({gain_cells(row)[0]})")
    over = next((row.gain_over for row in rows if row.gain_over), "")
    baseline = {"before": "the weights that it started from"}.get(over, "its own network untrained")
    texts = []
    for word, where in by_word.items():
        listed = "; ".join(where)
        if word == NO_DIFFERENCE:
            texts.append(f"No gain of {arm} over {baseline} was found in {listed}.")
        elif word in ("better", "worse", "higher", "lower"):
            texts.append(f"{arm} is {word} than {baseline} in {listed}.")
        else:
            texts.append(f"{arm} against {baseline}: {word}, so nothing can be said of {listed}.")
    return texts


def _sentence(arm: str, first: str, word: str, where: Sequence[str]) -> str:
    listed = "; ".join(where)
    if word == NO_DIFFERENCE:
        return f"No difference found between {arm} and {first} in {listed}."
    if word in ("better", "worse", "higher", "lower"):
        return f"{arm} is {word} than {first} in {listed}."
    return f"{arm} against {first}: {word}, so nothing can be said of {listed}."


def _title(row: Row) -> str:
    return f"{row.protocol} {row.metric} on {row.data}"


def _gap(row: Row) -> str:
    return table_cells([row])[0][3]
