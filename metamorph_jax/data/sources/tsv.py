"""TSV files whose first line names the columns, with random access to the rows.

    caption<TAB>image_path
    a red kite over a field .<TAB>train/000000007.jpg

No quoting: a quote is a character like any other, so none can swallow the lines after it. Such
files are read by a kind that knows their columns (`Kind.open`).
"""

from metamorph_jax import files
from metamorph_jax.data.sources.records import JsonlRecords
from metamorph_jax.errors import BadSample, FileError


class TsvRecords(JsonlRecords):
    """Rows by the names of their columns; indexed by byte offset as JSON lines are.

    A row with another number of cells than the first line, or that is not UTF-8, raises
    BadSample("bad_row") when it is read.

    Raises:
        FileError: the first line doesn't name these columns.
    """

    def __init__(self, path: str, columns: tuple[str, ...] = (), index_dir: str | None = None):
        super().__init__(path, index_dir)
        self.names = self._cells(0) if super().__len__() else []
        absent = [name for name in columns if name not in self.names]
        if absent:
            first = files.shown(" | ".join(self.names), 120)
            raise FileError(
                f"{files.shown(path)}: the first line has to name the columns "
                f"{', '.join(columns)}, but it is {first or 'empty'}"
            )

    def __len__(self) -> int:
        return max(super().__len__() - 1, 0)

    def __getitem__(self, k: int) -> dict:
        cells = self._cells(k + 1)
        if len(cells) != len(self.names):
            raise BadSample(
                "bad_row", f"{self.where(k)} has {len(cells)} cells, expected {len(self.names)}"
            )
        return dict(zip(self.names, cells, strict=True))

    def where(self, k: int) -> str:
        """File and line of row k."""
        return super().where(k + 1)

    def _cells(self, k: int) -> list[str]:
        """The cells of line k of those that are not empty."""
        try:
            text = self.read(k).decode("utf-8-sig" if k == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise BadSample("bad_row", f"{super().where(k)} is not UTF-8: {error}") from error
        return text.rstrip("\r\n").split("\t")
