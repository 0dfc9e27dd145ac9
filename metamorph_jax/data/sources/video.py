"""Video frames through PyAV (extra `video`): which frames to take, and taking them."""

import dataclasses

import numpy as np

from metamorph_jax import files
from metamorph_jax.errors import BadSample, FileError, MissingFile

EXTENSIONS = (
    ".mp4", ".m4v", ".avi", ".mov", ".mkv", ".wmv", ".flv", ".webm", ".mpg", ".mpeg",
    ".mts", ".m2ts", ".3gp", ".ogv",
)  # fmt: skip
# Containers only: a playlist by the name of a video must not open other files, or addresses.
_OPEN = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,asf,flv,live_flv,mpeg,mpegvideo,"
    "mpegts,ogg,m4v,h264,hevc",
    "protocol_whitelist": "file",
}


def is_video(path: str) -> bool:
    return path.lower().endswith(EXTENSIONS)


def _av():
    try:
        import av
    except ImportError as e:
        raise ImportError(
            "reading video needs PyAV: pip install 'metamorph_jax[video]' (or pip install av)"
        ) from e
    return av


def _opened(av, path: str):
    """The open container; BadSample if the path is not that of a regular file."""
    try:
        return av.open(str(files.regular(path)), options=_OPEN)
    except MissingFile as e:
        raise BadSample("missing", files.shown(path)) from e
    except FileError as e:
        raise BadSample("unreadable", str(e)) from e


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """Number of frames, frames per second, and (width, height) of a frame in pixels."""

    frames: int
    fps: float
    size: tuple[int, int] = (0, 0)

    @property
    def length(self) -> float:
        return self.frames / self.fps


def probe(path: str) -> VideoInfo:
    """Reads the header; counts packets where the container does not say how many frames it has."""
    av = _av()
    try:
        with _opened(av, path) as container:
            if not container.streams.video:
                raise BadSample("no_video_stream", path)
            stream = container.streams.video[0]
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            frames = int(stream.frames or 0)
            size = stream.width, stream.height
            if frames <= 0:
                frames = sum(1 for p in container.demux(stream) if p.size)
    except (av.error.FFmpegError, OSError) as e:
        raise BadSample("bad_video", f"{path}: {e}") from e
    if frames <= 0 or not np.isfinite(fps) or fps <= 0:
        raise BadSample("bad_video", f"{path}: {frames} frames at {fps} per second")
    return VideoInfo(frames, fps, size)


def frame_indices(info: VideoInfo, step: float, limit: int = 45) -> list[int]:
    """Frames at t = 0, step, 2 step, … before the end, at most `limit`: min(int(t fps), n - 1)."""
    step = max(round(step, 1), 0.1)
    indices = []
    while len(indices) < limit:
        t = len(indices) * step
        if t >= info.length:
            break
        indices.append(min(int(t * info.fps), info.frames - 1))
    return indices


def decode_frames(path: str, wanted: list[int], max_pixels: int) -> dict[int, np.ndarray]:
    """The wanted frames as {index: uint8[h, w, 3] RGB}; read in order from the start, so exact.

    Where a container has fewer frames than its header says, its last one stands for the missing.
    """
    av = _av()
    missing = sorted(set(wanted))
    out: dict[int, np.ndarray] = {}
    last = None
    try:
        with _opened(av, path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if stream.width * stream.height > max_pixels:
                raise BadSample("oversized", f"{path}: {stream.width}x{stream.height}")
            for index, frame in enumerate(container.decode(stream)):
                if frame.width * frame.height > max_pixels:
                    raise BadSample("oversized", f"{path}: {frame.width}x{frame.height}")
                last = frame
                if index == missing[0]:
                    out[missing.pop(0)] = frame.to_ndarray(format="rgb24")
                    if not missing:
                        break
    except (av.error.FFmpegError, OSError, IndexError) as e:
        if last is None:
            raise BadSample("bad_video", f"{path}: {e}") from e
    if last is None:
        raise BadSample("bad_video", f"{path}: no frames")
    for index in missing:
        out[index] = last.to_ndarray(format="rgb24")
    return out
