"""Where the splits of a folder of pictures lie.

`datasets` takes every word of a path that names a split for one, of a class or a file as well: of
the classes "bus", "car" and "train" it would learn from test/train too, or read the last alone.
"""

from pathlib import Path

from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
PICTURES = frozenset(ImageFolder.EXTENSIONS)
BESIDE = frozenset({"", ".md", ".txt", ".py", ".ini", ".db"})  # what may lie beside pictures


def picture_splits(folder: Path) -> dict[str, str] | None:
    """Return the patterns of the files of each split, as `load_dataset` takes them.

    Splits are the folders train, validation and test, or as `SPLIT_NAMES` calls them, in small or
    capital letters, which hold folders of classes. Where there is none, all pictures are of the
    training split.

    Args:
        folder: of class folders, or of split folders of these, maybe within a single other one.

    Returns:
        None where the folder is no such one, but of parquet files, of pictures with a table of
        metadata, or one whose README.md says what the splits are.
    """
    files = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
    kinds = {p.suffix.lower() for p in files}
    if not kinds & PICTURES or kinds - PICTURES - BESIDE or _is_described(folder / "README.md"):
        return None
    place, inner = folder, _folders(folder)
    while not (found := _named(inner)) and len(inner) == 1:
        (place,) = inner.values()
        inner = _folders(place)
    patterns = {s: f"{path.relative_to(folder).as_posix()}/**" for s, path in found.items()}
    return patterns or {"train": "**"}


def _named(inner: dict[str, Path]) -> dict[str, Path]:
    """Of folders by name, those of splits: they hold further folders, as a class does not."""
    found = {}
    for split, names in SPLIT_NAMES.items():
        if name := next((n for n in names if n in inner and _folders(inner[n])), None):
            found[split] = inner[name]
    return found


def _folders(place: Path) -> dict[str, Path]:
    return {p.name.lower(): p for p in sorted(place.iterdir()) if p.is_dir() and p.name[0] != "."}


def _is_described(readme: Path) -> bool:
    return readme.is_file() and "configs:" in readme.read_text("utf-8", errors="replace")
