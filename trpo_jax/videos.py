"""Video files: animated GIF, and MP4 by imageio-ffmpeg, which includes ffmpeg."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from trpo_jax.environments.base import Film
from trpo_jax.files import write_atomically
from trpo_jax.sentences import UsageError, first_line, shown

_GIF_WIDTH = 300  # pixels
_MOST_FRAMES = {".gif": 500, ".mp4": 1000}
_ELSEWHERE = "choose another --output"


def check_video(file: Path) -> None:
    """Raise `UsageError` unless a video can be written under this name."""
    kind = file.suffix.lower()
    if kind not in _MOST_FRAMES:
        raise UsageError(f"a video must be a file that ends in {' or '.join(_MOST_FRAMES)}, got {shown(str(file))}.")
    if kind == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise UsageError("videos as .mp4 need the package imageio-ffmpeg: pip install '.[play]'; or choose .gif.")


def most_frames(file: Path) -> int:
    """The largest number of frames in a file of this kind."""
    return _MOST_FRAMES[file.suffix.lower()]


def write_video(file: Path, film: Film) -> None:
    """Write an endless animation (.gif, 300 pixels wide) or a video (.mp4, H.264).

    Raises:
      UsageError: if the file cannot be written.
    """
    encode = _as_mp4 if file.suffix.lower() == ".mp4" else _as_gif
    write_atomically(file, encode(film), _ELSEWHERE)


def _as_gif(film: Film) -> bytes:
    from PIL import Image

    def small(frame: np.ndarray) -> Any:
        picture = Image.fromarray(frame)
        height = round(picture.height * _GIF_WIDTH / picture.width)
        return picture.resize((_GIF_WIDTH, height)).quantize(64)

    (first, *rest), sink = map(small, film.frames), io.BytesIO()
    first.save(sink, "GIF", save_all=True, append_images=rest, duration=1000 / film.per_second, loop=0)
    return sink.getvalue()


def _as_mp4(film: Film) -> bytes:
    import imageio_ffmpeg

    height, width = (side - side % 2 for side in film.frames[0].shape[:2])  # the codec needs even sides
    with tempfile.TemporaryDirectory() as folder:  # ffmpeg must be able to go back in the file
        file = Path(folder) / "video.mp4"
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{film.per_second:g}"]
        coded = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-loglevel", "error", str(file)]
        # imageio_ffmpeg.write_frames would fork, which is unsafe with JAX's threads.
        command = [imageio_ffmpeg.get_ffmpeg_exe(), *raw, "-i", "-", *coded]
        ffmpeg = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        assert ffmpeg.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has failed, and its output tells why
            for frame in film.frames:
                ffmpeg.stdin.write(np.ascontiguousarray(frame[:height, :width]).tobytes())
        _, errors = ffmpeg.communicate()
        if ffmpeg.returncode:
            why = first_line(RuntimeError(errors.decode(errors="replace").strip()))
            raise UsageError(f"ffmpeg cannot write the video ({why}); choose .gif.")
        return file.read_bytes()
