"""`Sample`: one conversation with its images, whatever file it came from."""

import dataclasses
import hashlib
import os
import re

from metamorph_jax.errors import BadSample
from metamorph_jax.files import shown

IMAGE = "<image>"
VIDEO = "<video>"
# (role, text); role: system, user, assistant, or source, target; text may hold <image> markers
Turn = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Inside:
    """Where an image is in a tar: the member's name, and `size` bytes from `offset`."""

    name: str
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class ImageRef:
    """One image: a file, or something cut out of a file.

    Attributes:
        path: path under the data root.
        inside: which member of the tar `path`, or None.
        data: bytes of the image where a record of the file `path` holds them itself.
        frame: index of a video frame, or None.
        box: (x1, y1, x2, y2) pixels to crop, or None.
        marks: ((name, (x, y, w, h)), ...) boxes to draw into the image, with their names.
        mirror: then, whether left and right change places.
        square: then, whether the image is stretched to a square of its longer side.
        caption: what the data say that it shows, for decoders that learn it; "" if nothing. The
            image is the same whatever it says.
    """

    path: str
    frame: int | None = None
    box: tuple[float, float, float, float] | None = None
    marks: tuple[tuple[str, tuple[float, float, float, float]], ...] = ()
    inside: Inside | None = None
    data: bytes | None = None
    mirror: bool = False
    square: bool = False
    caption: str = dataclasses.field(default="", compare=False)

    @property
    def name(self) -> str:
        """What messages call its file."""
        if self.inside is not None:
            return f"{self.path}: {self.inside.name}"
        return self.path if self.data is None else f"{self.path}: an image in the record"

    def file(self) -> "ImageRef":
        """All of the image, or video, that it is cut out of."""
        return dataclasses.replace(self, frame=None, box=None, marks=(), mirror=False, square=False)

    def key(self) -> str:
        """A name that differs between any two different images; caches use it."""
        key = self.path
        if self.inside is not None:
            key += f"#member={self.inside.name}@{self.inside.offset}"
        if self.data is not None:
            key += f"#sha256={hashlib.sha256(self.data).hexdigest()}"
        if self.frame is not None:
            key += f"#frame={self.frame}"
        if self.box is not None:
            key += "#box=" + ",".join(f"{v:g}" for v in self.box)
        for name, box in self.marks:
            key += f"#mark={name}:" + ",".join(f"{v:g}" for v in box)
        key += "#mirror" * self.mirror + "#square" * self.square
        return key


@dataclasses.dataclass(frozen=True)
class Sample:
    """A conversation. The number of <image> markers in `turns` equals len(images).

    Attributes:
        id: name in the file, for messages only.
        source: name of the source.
        turns: ((role, text), ...), user first, roles alternate; before it perhaps a system turn. Or
            a source and a target, for data with a wording of its own (`chat_templates.py`).
        images: in the order of their markers.
        kind: of its record, see `kinds.py`.
        where: file, line and id of its record, for messages.
        spares: whether it goes without images that can't be used, as a document of the web does.
    """

    id: str
    source: str
    turns: tuple[Turn, ...]
    images: tuple[ImageRef, ...] = ()
    kind: str = ""
    where: str = ""
    spares: bool = False

    @property
    def answer_images(self) -> tuple[ImageRef, ...]:
        """The images in answers."""
        roles = [role for role, text in self.turns for _ in range(text.count(IMAGE))]
        pairs = zip(roles, self.images, strict=True)
        return tuple(ref for role, ref in pairs if role in ("assistant", "target"))

    def checked(self, max_images: int) -> "Sample":
        """Itself, or BadSample if the markers don't match the images, or a text isn't one."""
        for k, (_, text) in enumerate(self.turns):
            if not _is_encodable(text):
                raise BadSample("bad_text", f"turn {k} has half of a surrogate pair")
        markers = sum(text.count(IMAGE) for _, text in self.turns)
        if markers != len(self.images):
            raise BadSample("marker_mismatch", f"{markers} markers, {len(self.images)} images")
        if markers > max_images:
            raise BadSample("too_many_images", f"{markers} images, at most {max_images} allowed")
        return self


def images_in_front(sample: Sample) -> Sample:
    """The sample with one marker in each message that had any, on a line of its own at the front.

    This is how LLaVA's training code reads its data, where a record has one image at most.

    Raises:
        BadSample: two images of one message, of which one would be lost.
    """
    counts = [text.count(IMAGE) for _, text in sample.turns]
    if max(counts, default=0) > 1 and sum(counts) == len(sample.images):
        raise BadSample("several_images", "legacy_image_front keeps one image of a message")
    front = lambda text: f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()  # noqa: E731
    turns = tuple((role, front(text) if IMAGE in text else text) for role, text in sample.turns)
    return dataclasses.replace(sample, turns=turns)


def _is_encodable(text: str) -> bool:
    """Whether a text is one; JSON may spell out halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_PARENT = re.compile(r"(^|[/\\])\.\.([/\\]|$)")


def confined(root: str, path: str) -> str:
    """`path` joined to `root`; BadSample if it would leave the root.

    The test looks at the text of the path only, so a link inside the root may point elsewhere:
    the owner of the folder put it there.
    """
    if not isinstance(path, str) or not path or "\0" in path or not _is_encodable(path):
        raise BadSample("bad_path", shown(repr(path)))
    if "://" in path or path.startswith("data:"):
        raise BadSample("bad_path", f"{shown(path)}: only files under the root are read, not URLs")
    if _PARENT.search(path):
        raise BadSample("path_outside_root", shown(path))
    root = os.path.abspath(root)
    full = os.path.normpath(path if os.path.isabs(path) else os.path.join(root, path))
    if full != root and not full.startswith(root.rstrip(os.sep) + os.sep):
        raise BadSample("path_outside_root", shown(path))
    return full
