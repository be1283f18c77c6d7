"""The pages for people: README.md, CONTRIBUTING.md and docs/."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def page(name):
    return (ROOT / "docs" / f"{name}.md").read_text("utf-8")


def snippets(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def only(text, *words):
    """The snippet of a page that has all these words."""
    (found,) = [s for s in snippets(text) if all(word in s for word in words)]
    return found
