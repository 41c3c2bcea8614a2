"""Decode audio files to what a model's feature extractor takes."""

from __future__ import annotations

from itertools import chain

import numpy as np

from mindspeed_mm.data.quarantine import BadSample
from mindspeed_mm.errors import UserError
from mindspeed_mm.extras import import_extra

_SHORTEST = 0.1  # seconds; of less, models make a single token or none


def load_audio(path: str, where: str, rate: int, longest: int | None = None) -> np.ndarray:
    """Decode the first sound track of a file.

    Args:
        path: absolute path.
        where: names the row in errors.
        rate: samples per second that the model hears; others are resampled to it.
        longest: samples that the model hears at most, if it would leave out the rest.

    Returns:
        Float32 of shape (samples,) in [-1, 1], the mean of all channels.

    Raises:
        BadSample: no audio that can be decoded, or too short or too long for the model.
        UserError: PyAV is missing.
    """
    av = import_extra("av", "audio", "a row with audio")
    parts: list[np.ndarray] = []
    heard = 0
    try:
        with av.open(path) as container:
            resampler = av.AudioResampler(format="fltp", rate=rate)
            for frame in chain(container.decode(audio=0), [None]):
                for part in resampler.resample(frame):
                    parts.append(part.to_ndarray().mean(axis=0))
                    heard += len(parts[-1])
                if longest is not None and heard > longest:
                    raise BadSample(
                        where,
                        f"audio {path} is longer than the {longest / rate:g} seconds that the model hears; cut it",
                    )
    except UserError:
        raise
    except Exception as error:  # decoders stumble over broken files in any way
        raise BadSample(where, f"audio {path} cannot be decoded: {error}; replace the file") from error
    if heard < _SHORTEST * rate:
        raise BadSample(where, f"audio {path} has {heard / rate:g} seconds, fewer than {_SHORTEST}; remove the row")
    return np.concatenate(parts).astype(np.float32)
