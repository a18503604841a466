"""One pass over the texts of a split: what its rows lack, which stand there twice, and their fingerprints."""

from __future__ import annotations

from dataclasses import dataclass, field

from tunesmith.data.audit.overlap import Print, fingerprint
from tunesmith.data.audit.rows import CHECKS, FORMS, form_of, refused, row_defects
from tunesmith.data.datasets import Source
from tunesmith.data.dialogue import BadRow, Preference, Row
from tunesmith.data.readers import Report
from tunesmith.data.template import Template
from tunesmith.errors import UserError


@dataclass
class Texts:
    """What one pass over the rows of a split gives.

    refused: rows that the template does not take. skipped: incomplete pairs that have two texts all the same.
    """

    rows: int = 0
    forms: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FORMS, 0))
    usable: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FORMS, 0))
    unreadable: Report = field(default_factory=Report)
    refused: Report = field(default_factory=Report)
    defects: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in CHECKS})
    prints: list[Print] = field(default_factory=list)
    skipped: list[tuple[Preference, str]] = field(default_factory=list)
    pair_places: set[tuple[int, int]] = field(default_factory=set)
    repeated_prompts: int = 0
    form: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_texts(source: Source, split: str, template: Template) -> Texts:
    """One pass over a split. template: the form in which a model would read its rows.

    Raises: UserError if there is no row.
    """
    texts, seen = Texts(), dict[tuple[bytes, ...], str]()
    prompts = set[bytes]()
    reader, rows = source.opened(split, texts.unreadable)
    for located in rows:
        texts.rows += 1
        place = source.place(split, located.file, located.line)
        try:
            row = reader.read(located.value)
        except BadRow as bad:
            texts.unreadable.add_bad(str(bad), place)
            continue
        form, complete = form_of(row), _is_complete(row)
        usable = complete and _is_taken(row, place, template, texts.refused)
        texts.forms[form] += 1
        texts.usable[form] += usable
        if isinstance(row, Preference):
            texts.pair_places.add((located.file, located.line))
            if not complete:
                texts.skipped.append((row, place))
        printed = fingerprint(row, place, usable)
        texts.prints.append(printed)
        defects = row_defects(located.value if isinstance(located.value, dict) else {}, row, template)
        if printed.texts in seen:
            texts.defects["duplicate"].append(f"{place} = {seen[printed.texts]}")
        elif len(printed.texts) == 2 and printed.texts[::-1] in seen and "same_answers" not in defects:
            texts.defects["contradiction"].append(f"{place} = {seen[printed.texts[::-1]]}")
        elif printed.prompt in prompts:
            texts.repeated_prompts += 1
        if printed.texts:
            seen.setdefault(printed.texts, place)
        if printed.prompt:
            prompts.add(printed.prompt)
        for kind in defects:
            texts.defects[kind].append(place)
    texts.rows += texts.unreadable.rows
    texts.form, texts.notes = reader.form_lines(), reader.notes()
    if not texts.rows:
        raise UserError(
            f"{source.name} ({split}) has no row in {', '.join(map(str, source.files[split]))}; add some, or remove the file"
        )
    return texts


def _is_taken(row: Row, place: str, template: Template, refusals: Report) -> bool:
    reason = refused(row, template)
    if reason:
        refusals.add_bad(reason, place)
    return not reason


def _is_complete(row: Row) -> bool:
    try:
        row.check()
    except BadRow:
        return False
    return True
