"""Ask a film: encode it once, then ask as often as you like.

    from tvg_lib import Grounder
    grounder = Grounder(ZeroShotWindow(), tiny_dual_encoder())      # or a trained model
    grounder.index("film.mp4")
    answer = grounder.ground("the red circle jumps", top_k=5)
    answer                      # draws itself
    answer.draw()               # the same as a figure, with pictures of the film

What answers is either a rule that needs no training (`tvg_lib.baselines.ZeroShotWindow`) or any
`PointGrounder` (SnAG, MSCL, HieraMamba). Films of any length are taken: they are decoded and
encoded in a stream, and everything behind the encoder grows linearly with the number of clips.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from tvg_lib import paths
from tvg_lib.baselines import ClipScores, ZeroShotWindow
from tvg_lib.checkpoints import read_state, write_state
from tvg_lib.data.batching import evaluation_batches
from tvg_lib.data.dataset import GroundingDataset, Query
from tvg_lib.data.features import ArrayStore
from tvg_lib.decoding import (
    DecodingConfig,
    Prediction,
    decode,
    ground,
    point_moments,
    spread_over_levels,
    to_predictions,
)
from tvg_lib.encoders.protocols import DualEncoder
from tvg_lib.encoders.video import EncodedVideo, WindowPlan, cached_video, frames_at
from tvg_lib.errors import ConfigurationError, DataError
from tvg_lib.models.point_grounder import PointGrounder
from tvg_lib.moments import Moment, TimeGrid
from tvg_lib.nn.points import PointGrid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "tvg-companion/grounder/1"
CARD, WEIGHTS = "grounder.json", "weights.safetensors"
PICTURES = 5  # of the first answer, in a drawing


@dataclass(frozen=True, eq=False)
class IndexedVideo:
    """A film that has been encoded, as far as that needs no question.

    Attributes:
        encoded: features of its clips.
        pyramid: what a model's `encode_video` made of them, whatever that is; None for a rule.
    """

    encoded: EncodedVideo
    pyramid: Any = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Answer:
    """Ranked moments that answer one question about one film; draws itself.

    Attributes:
        prediction: the moments, and the relevance of the clips where it is known.
        encoded: the film.
    """

    prediction: Prediction
    encoded: EncodedVideo

    def __len__(self) -> int:
        return len(self.prediction)

    def __iter__(self) -> Iterator[Moment]:
        return iter(self.prediction)

    def __getitem__(self, rank: int) -> Moment:
        return list(self.prediction)[rank]

    @property
    def best(self) -> Moment:
        """The first-ranked moment.

        Raises:
            DataError: nothing was found.
        """
        if not len(self):
            raise DataError(f"{self.prediction.text!r}: nothing was found in {self.encoded.name}")
        return self.prediction.best

    def __repr__(self) -> str:
        found = "; ".join(repr(moment) for moment in self) or "nothing found"
        return f"Answer({self.prediction.text!r} in {self.encoded.name}: {found})"

    def _repr_html_(self) -> str:
        return self.prediction._repr_html_()

    def draw(self, truth: np.ndarray | None = None, pictures: int = PICTURES) -> "Figure":
        """The timeline, and above it pictures of the film from the first answer.

        Args:
            truth: (M, 2) true moments in seconds, where they are known.
            pictures: how many; 0, or a film without a file, leaves them out.

        Raises:
            DataError: the file of the film has gone, or cannot be read any more.
        """
        from tvg_lib import viz

        prediction, encoded = self.prediction, self.encoded
        relevance = None
        if prediction.saliency is not None:
            relevance = {"answer": viz.clip_curve(encoded.grid, prediction.saliency)}
        strip = None
        if pictures and encoded.path is not None and len(self):
            shares = (np.arange(pictures) + 0.5) / pictures
            times = (self.best.start + shares * self.best.length).tolist()
            strip = list(zip(times, frames_at(encoded.path, times), strict=True))
        return viz.timeline(
            prediction.text,
            encoded.duration,
            truth=truth,
            answers={"answer": prediction.moments},
            relevance=relevance,
            pictures=strip,
            top=len(self),
            subtitle=encoded.name,
        )


class Grounder:
    """A model or rule, the encoders it lives on, and the films it has been shown.

    Args:
        model: a trained `PointGrounder`, or a rule that compares clips with the sentence.
        encoders: `video` and `text`; `video` may be None where clips come encoded.
        decoding, grid: how points become moments; those the model was trained with.
        external: clip scores multiplied into those of a model's points.

    Raises:
        ConfigurationError: encoders and model do not fit together.
    """

    def __init__(
        self,
        model: PointGrounder | ZeroShotWindow,
        encoders: DualEncoder,
        *,
        decoding: DecodingConfig | None = None,
        grid: PointGrid | None = None,
        external: ClipScores | None = None,
    ) -> None:
        self.model = model
        self.encoders = encoders
        self.decoding = decoding or DecodingConfig()
        self.grid = grid or PointGrid()
        self.external = external
        self.current: IndexedVideo | None = None
        if isinstance(model, PointGrounder):
            model.eval()
        self._check_widths()

    def _check_widths(self) -> None:
        """Compare what the encoders give with what is read."""
        video, text = self.encoders.video, self.encoders.text
        wanted = {} if not isinstance(self.model, PointGrounder) else _widths(self.model)
        given = {"text": text.dim} | ({} if video is None else {"video": video.dim})
        for kind, width in given.items():
            if wanted.get(kind, width) != width:
                raise ConfigurationError(
                    f"{type(self.model).__name__} reads {kind} features of width {wanted[kind]}, "
                    f"but the encoder gives {width}"
                )
        compares = not isinstance(self.model, PointGrounder) or self.external is not None
        if compares and video is not None and video.dim != text.dim:
            raise ConfigurationError(
                "clips and sentences are compared, so their vectors need one width; found "
                f"{video.dim} and {text.dim}"
            )

    def index(
        self,
        video: Path | str | EncodedVideo | np.ndarray,
        *,
        grid: TimeGrid | None = None,
        duration: float | None = None,
        name: str = "video",
        progress: bool = False,
    ) -> IndexedVideo:
        """Encode a film; the questions that follow are about it.

        Args:
            video: a file; or what `encode_video` made of one; or features (T, D).
            grid, duration, name: of features; the grid is that of the video encoder and the
                duration reaches to the end of the last clip where not given.
            progress: show a bar while a file is encoded.

        Returns:
            for `ground(..., video=...)`, when there are several films.

        Raises:
            DataError: the file cannot be read, or the features are another encoder's.
            ConfigurationError: a file, but no video encoder; features, but no grid.
        """
        encoded = self._encoded(video, grid, duration, name, progress)
        width = encoded.features.shape[1]
        wanted = self.encoders.text.dim
        if isinstance(self.model, PointGrounder):
            wanted = _widths(self.model).get("video", width)
        if width != wanted:
            raise DataError(f"{encoded.name}: expected features of width {wanted}, found {width}")
        pyramid = None
        if isinstance(self.model, PointGrounder):
            device = next(self.model.parameters()).device
            clips = torch.from_numpy(encoded.features)[None].to(device)
            mask = torch.ones(clips.shape[:2], dtype=torch.bool, device=device)
            with torch.inference_mode():
                pyramid = self.model.encode_video(clips, mask)
        self.current = IndexedVideo(encoded, pyramid)
        return self.current

    def _encoded(
        self,
        video: Path | str | EncodedVideo | np.ndarray,
        grid: TimeGrid | None,
        duration: float | None,
        name: str,
        progress: bool,
    ) -> EncodedVideo:
        encoder = self.encoders.video
        if isinstance(video, EncodedVideo):
            if encoder is not None and video.encoder != encoder.name:
                raise DataError(
                    f"{video.name}: expected features of {encoder.name}, found those of "
                    f"{video.encoder}"
                )
            return video
        if isinstance(video, np.ndarray):
            if grid is None:
                if encoder is None:
                    raise ConfigurationError(
                        "features need grid=, the TimeGrid their clips lie on; there is no video "
                        "encoder that would say"
                    )
                grid = WindowPlan.of(encoder).grid
            end = grid.clip_span(len(video) - 1)[1]
            return EncodedVideo(name, video, grid, end if duration is None else duration, "given")
        if encoder is None:
            raise ConfigurationError(
                f"{video}: a file needs a video encoder; this grounder takes features only"
            )
        return cached_video(video, encoder, progress=progress)

    def ground(self, query: str, top_k: int = 5, video: IndexedVideo | None = None) -> Answer:
        """The moments that answer a question, best first.

        Args:
            query: one sentence.
            top_k: the most moments.
            video: as from `index`; the last one indexed where not given.

        Raises:
            ConfigurationError: no film has been indexed, or `top_k` is not positive.
            DataError: the text encoder refuses the sentence.
        """
        video = video or self.current
        if video is None:
            raise ConfigurationError("there is no film to ask about; call index(...) first")
        if top_k < 1:
            raise ConfigurationError(f"top_k: expected at least 1, found {top_k}")
        asked = _question(query, video.encoded, self.encoders)
        if isinstance(self.model, PointGrounder):
            prediction = self._predict(asked, video, top_k)
        else:
            (prediction,) = replace(self.model, keep=top_k).predict(asked)
        return Answer(prediction, video.encoded)

    def predict(self, dataset: GroundingDataset) -> list[Prediction]:
        """Answers to every query of a data set with features of this grounder's encoders."""
        if not isinstance(self.model, PointGrounder):
            return self.model.predict(dataset)
        scores = None if self.external is None else self.external.of(dataset)
        return ground(self.model, dataset, self.decoding, self.grid, external=scores)

    @torch.inference_mode()
    def _predict(self, asked: GroundingDataset, video: IndexedVideo, top_k: int) -> Prediction:
        """Ask the model; the film is not encoded again."""
        config = replace(self.decoding, keep=top_k)
        (batch,) = evaluation_batches(asked)
        batch = batch.to(next(self.model.parameters()).device)
        text = self.model.encode_text(batch.text, batch.text_mask)
        output = self.model.predict(video.pyramid, text, batch.query_video)
        steps = output.pyramid.clips_per_step
        factors = None
        if self.external is not None:
            scores = list(self.external.of(asked).values())
            factors = spread_over_levels(scores, output.lengths, steps).to(batch.video.device)
        moments, scores = decode(*point_moments(output, self.grid, config, factors), config)
        (prediction,) = to_predictions(moments * steps, scores, batch, asked)
        return prediction

    def save(self, folder: Path | str, half: bool = False) -> None:
        """Write a model or rule and what belongs to it, whole or not at all.

        The encoders are named, not stored: they ship with the package, or come from the hub.

        Args:
            folder: made if needed.
            half: store weights in half precision.

        Raises:
            ConfigurationError: the model cannot be built again from a configuration.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        architecture = self.model
        if isinstance(self.model, PointGrounder):
            architecture = getattr(self.model, "config", None)
            if not is_dataclass(architecture) or not _is_ours(type(self.model)):
                raise ConfigurationError(
                    f"{type(self.model).__name__} is not one of this library's models, built from "
                    "a configuration alone; keep its weights yourself"
                )
            tensors = self.model.state_dict()
            if half:
                tensors = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
            write_state(folder / WEIGHTS, tensors, {"format": FORMAT})
        card = {
            "format": FORMAT,
            "model": _path(type(self.model)),
            "architecture": {"class": _path(type(architecture))} | asdict(architecture),
            "encoders": _described(self.encoders),
            "decoding": asdict(self.decoding),
            "grid": asdict(self.grid),
            "external": None if self.external is None else asdict(self.external),
        }
        # Last, because it says that the folder is complete.
        paths.write_text(folder / CARD, json.dumps(card, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path | str, encoders: DualEncoder) -> Self:
        """Read what `save` wrote.

        Args:
            folder: of the grounder.
            encoders: the same that it was made with.

        Raises:
            DataError: a file is missing or damaged, its parts do not fit, or it was made with
                other encoders.
        """
        folder = Path(folder)
        card_file = folder / CARD
        try:
            card = json.loads(card_file.read_text(encoding="utf-8"))
            if card["format"] != FORMAT:
                raise DataError(f"{card_file}: expected {FORMAT}, found {card['format']!r}")
            _check_encoders(card["encoders"], encoders, card_file)
            kind = _class(card["model"], (PointGrounder, ZeroShotWindow))
            values = _tuples(card["architecture"])
            architecture = _class(values.pop("class"), (object,))(**values)
            model = architecture
            if issubclass(kind, PointGrounder):
                model = kind(architecture)
                model.load_state_dict(read_state(folder / WEIGHTS)[0])
            external = card["external"]
            return cls(
                model,
                encoders,
                decoding=DecodingConfig(**card["decoding"]),
                grid=PointGrid(**_tuples(card["grid"])),
                external=None if external is None else ClipScores(**external),
            )
        except DataError:
            raise
        except OSError as error:
            raise DataError(f"{card_file}: expected a saved grounder, found: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise DataError(f"{folder}: its parts do not fit together: {error!r}") from error

    def __repr__(self) -> str:
        film = "no film yet" if self.current is None else repr(self.current.encoded)
        return f"Grounder({type(self.model).__name__}, {film})"


def _question(text: str, encoded: EncodedVideo, encoders: DualEncoder) -> GroundingDataset:
    """A data set of one film and one question, whose moments nobody knows."""
    query = Query("question", encoded.name, text, np.zeros((0, 2)))
    return GroundingDataset(
        name=encoded.name,
        videos={encoded.name: encoded.video},
        queries=(query,),
        video_features=ArrayStore.of({encoded.name: encoded.features}),
        text_features=ArrayStore.of({query.id: encoders.text.encode_tokens([text])[0]}),
        sentence_features=ArrayStore.of({query.id: encoders.text.encode([text])}),
    )


def _widths(model: PointGrounder) -> dict[str, int]:
    """Widths of the features that a model reads, as far as its configuration says."""
    config = getattr(model, "config", None)
    names = {"video": "video_dim", "text": "text_dim"}
    return {kind: getattr(config, name) for kind, name in names.items() if hasattr(config, name)}


def _described(encoders: DualEncoder) -> dict[str, Any]:
    halves = {"video": encoders.video, "text": encoders.text}
    return {
        kind: None if half is None else {"name": half.name, "dim": half.dim}
        for kind, half in halves.items()
    }


def _check_encoders(saved: Mapping[str, Any], encoders: DualEncoder, card: Path) -> None:
    for kind, half in _described(encoders).items():
        if half != saved[kind]:
            raise DataError(
                f"{card}: made with the {kind} encoder {saved[kind]}, but given {half}; features "
                "of another encoder mean nothing to this model"
            )


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] == __package__


def _class(path: str, bases: tuple[type, ...]) -> type:
    """A class of this library by its dotted path; nothing else is imported on a file's word.

    Raises:
        ValueError: the path leads elsewhere.
    """
    module, _, name = path.rpartition(".")
    if module.split(".")[0] != __package__:
        raise ValueError(f"{path!r} is not a class of {__package__}")
    kind = getattr(import_module(module), name)
    if not (isinstance(kind, type) and issubclass(kind, bases) and _path(kind) == path):
        raise ValueError(f"{path!r} is not a class that a grounder is made of")
    return kind


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists where configurations have tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
