"""Where the splits of a folder of pictures lie.

`datasets` takes every word of a path that names a split for one, of a class or a file as well: of
the classes "bus", "car" and "train" it would learn from test/train too, or read the last alone.
"""

import re
from glob import escape
from pathlib import Path, PurePath

from datasets.data_files import SPLIT_KEYWORDS
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from hf_specreg.data.labels import DataError

_EDGE = "[-._ 0-9]"  # of a word in a name
_WORDS = {
    str(split): re.compile(rf"(^|{_EDGE})({'|'.join(words)})($|{_EDGE})", re.IGNORECASE)
    for split, words in SPLIT_KEYWORDS.items()
}


def picture_splits(folder: Path) -> dict[str, list[str]] | None:
    """Return the patterns of the files of each split, as `load_dataset` takes them.

    A class is the folder that a picture lies in. A split is of a folder further out that has a word
    of `datasets` for it in its name (train, val, test, training_set, Test and others). Where there
    is none, all pictures are of the training split; else those outside of all are left out.

    Args:
        folder: of class folders, or of split folders of these.

    Returns:
        None where the folder is no such one, but of other files, of pictures with a table of
        metadata or with splits and no classes, or one whose README.md says what its splits are.

    Raises:
        DataError: a split folder lies within another.
    """
    files = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    files = [p for p in files if not any(part.startswith(".") for part in p.parts)]
    pictures = [p for p in files if p.suffix.lower() in ImageFolder.EXTENSIONS]
    if 2 * len(pictures) <= len(files) or any(p.stem == "metadata" for p in files):
        return None
    classes = {picture.parent for picture in pictures}
    splits = sorted({found for place in classes if (found := _split_folder(place))})
    without_classes = not splits and all(_split(place.name) for place in classes)
    if without_classes or _is_described(folder / "README.md"):
        return None
    if inner := [b for b in splits if any(a in splits for a in b.parents)]:
        raise DataError(
            f"{folder}: one split folder lies within another: {inner[0]}; move it beside that one"
        )
    patterns: dict[str, list[str]] = {}
    for place in splits:
        patterns.setdefault(_split(place.name), []).append(f"{escape(place.as_posix())}/**")
    return patterns or {"train": ["**"]}


def _split(name: str) -> str | None:
    return next((split for split, word in _WORDS.items() if word.search(name)), None)


def _split_folder(place: PurePath) -> PurePath | None:
    """The innermost folder around a class that names a split."""
    return next((outer for outer in place.parents if _split(outer.name)), None)


def _is_described(readme: Path) -> bool:
    return readme.is_file() and "configs:" in readme.read_text("utf-8", errors="replace")
