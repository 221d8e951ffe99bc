"""An encoder and its references as a model whose classes are the references."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fam_plugins.core.captions import Template, embed_captions
from fam_plugins.core.contrast import Contrast, GalleryMean, mean_of
from fam_plugins.core.encoders import Output, as_encoder, pick_embeddings
from fam_plugins.core.gallery import Gallery, is_on_disk
from fam_plugins.core.messages import unknown_name
from fam_plugins.core.references import (
    as_tensor,
    embed_contrast,
    embed_once,
    listed,
    prototypes,
    tensors_of,
    unique_labels,
)
from fam_plugins.core.scores import embed, score, subtract_others, takes_images_only
from fam_plugins.core.similarity import Similarity, as_similarity

__all__ = ["ModelScores", "SimilarityModel"]


class SimilarityModel(nn.Module):
    """Images -> how alike each is to every reference, so that classifier tools work on encoders.

    Output ``j`` is the similarity to reference ``j``, larger meaning more alike. A tool that
    explains "class ``j``" then explains "how alike is this query to reference ``j``", and the
    predicted class is the nearest reference.

    The references are kept, detached, in a buffer: ``.to()``, ``.double()``, ``state_dict`` and
    ``copy.deepcopy`` carry them.

    Args:
        encoder: Images ``[B, ...]`` -> embeddings ``[B, D]``: any such module; a model of
            transformers or open_clip, whose image tower is called; pytorch-metric-learning's
            InferenceModel or ``{"trunk": ..., "embedder": ...}``. Used, not copied; layers keep
            their names.
        references: Embeddings ``[N, D]``, or images ``[N, C, H, W]`` or an image processor's output
            (``pixel_values``), embedded once, in eval mode, without gradient; of an encoder of
            images also supports ``[N, K, C, H, W]``, averaged to prototypes. A memory-mapped array
            (``np.load(..., mmap_mode="r")``) of any size stays on disk: scoring reads it in parts,
            explaining chosen references reads only their rows, ``state_dict`` does not carry it.
        similarity: ``"cosine"``, ``"dot"``, ``"euclidean"`` (negative squared distance), a distance
            of pytorch-metric-learning, or a function ``f(embeddings, references) -> [B, N]`` of
            your own. A function is explained through its true gradient: its maps are first-order
            statements and need not add up (:func:`~fam_plugins.core.similarity.as_similarity`).
        contrast: What to subtract, for "why this one rather than those": embeddings ``[M, D]``,
            images, :func:`~fam_plugins.gallery_mean`, or ``"others"`` for every other reference.
            The score of a reference becomes its similarity minus the mean similarity to the
            contrast. Kept as one row, except under ``"euclidean"`` and functions of your own,
            whose mean no single row gives.
        chunk_size: Images per forward pass when references or contrast are images.
        labels: A name for each reference: any hashable values.
        output: The field of what the encoder returns that is the embedding, or a callable that
            picks it; by default ``image_embeds``, else ``pooler_output``. A ``ViTModel`` whose
            checkpoint has no pooler makes up a random one and says so while loading: there pick
            the class token, ``lambda out: out.last_hidden_state[:, 0]``.
        forward_kwargs: Further arguments of the encoder's call, such as
            ``{"interpolate_pos_encoding": True}`` for images of another size.

    Attributes:
        encoder: The encoder.
        references: ``[N, D]``, a tensor or, for a memory-mapped array, a
            :class:`~fam_plugins.core.gallery.Gallery`.
        similarity: The name of the similarity.
        contrast_embeddings: The contrast, reduced to one row where there is such a form.
        labels: The label of each row, or ``None``; :meth:`index` finds the row of a label.

    Raises:
        TypeError: If the encoder is no module or returns nothing to pick the embedding from, or
            references are no tensor, or a processor's output without pixels.
        ValueError: On an unknown similarity, an encoder of texts only, another number of labels, or
            references that are empty, one-dimensional, not finite or of another width than the
            contrast.

    Example:
        >>> import torch
        >>> encoder = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> model = SimilarityModel(encoder, torch.eye(3))
        >>> model(torch.ones(2, 3, 4, 4)).shape
        torch.Size([2, 3])
    """

    references: Tensor | Gallery
    contrast_embeddings: Tensor | None
    contrast_terms: Tensor | None

    def __init__(
        self,
        encoder: Any,
        references: Tensor | Mapping[str, Any],
        *,
        similarity: str | Similarity | Callable[..., Tensor] = "cosine",
        contrast: Contrast | Mapping[str, Any] = None,
        chunk_size: int = 32,
        labels: Sequence[Hashable] | Tensor | None = None,
        output: Output = None,
        forward_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        encoder = as_encoder(encoder)
        self._reading: dict[str, Any] = {"output": output, "forward_kwargs": forward_kwargs}
        chosen = as_similarity(similarity)
        if isinstance(contrast, str) and contrast != "others":
            raise ValueError(f'contrast must be "others", embeddings or images, not {contrast!r}')
        on_disk = is_on_disk(references)
        if on_disk and not chosen.by_reference:
            raise ValueError(
                "a memory-mapped gallery is scored in parts, which a function of your own may "
                "not allow: choose a named similarity or a distance of pytorch-metric-learning"
            )
        rows: Any = Gallery(references) if on_disk else tensors_of(references, "references")[0]
        if labels is not None:
            labels = tuple(listed(labels, rows.shape[0] if rows.shape else 0, "references"))
        if not on_disk:
            shots = rows.shape[:2] if rows.dim() == 5 and takes_images_only(encoder) else None
            given = rows.flatten(0, 1) if shots else references
            rows = embed_once(encoder, given, "references", chunk_size, **self._reading)
            rows = prototypes(rows.unflatten(0, shots), similarity=chosen) if shots else rows
        against: Tensor | GalleryMean | None = None
        if isinstance(contrast, str):
            if len(rows) < 2:
                raise ValueError(
                    'contrast="others" needs at least 2 references and there is 1: pass '
                    "embeddings or images as contrast instead"
                )
            if chosen.averages:
                against = mean_of(chosen, rows.parts() if isinstance(rows, Gallery) else [rows])
        elif contrast is not None:
            reading = {"width": rows.shape[1], **self._reading}
            against = embed_contrast(encoder, contrast, chosen, chunk_size, **reading)
        self.encoder = encoder
        self.similarity = chosen.name
        self._similarity = chosen
        self.labels: tuple[Any, ...] | None = labels
        self._others = isinstance(contrast, str)
        if isinstance(rows, Gallery):
            self.references = rows
        else:
            self.register_buffer("references", rows)
        row: Any = against
        terms: Tensor | None = None
        if isinstance(against, GalleryMean):
            row, terms = against.row, against.terms
        self.register_buffer("contrast_embeddings", row)
        self.register_buffer("contrast_terms", terms)
        # A new module starts in training mode; the encoder may well not be in it.
        self.training = encoder.training

    @classmethod
    def from_support(
        cls,
        encoder: Any,
        images: Tensor | Mapping[str, Any],
        labels: Sequence[Hashable] | Tensor,
        *,
        similarity: str | Similarity | Callable[..., Tensor] = "cosine",
        contrast: Contrast | Mapping[str, Any] = None,
        chunk_size: int = 32,
        **reading: Any,
    ) -> SimilarityModel:
        """Build a few-shot classifier: one reference a class, averaged over its supports.

        Args:
            encoder: Images ``[B, ...]`` -> embeddings ``[B, D]``.
            images: Support images ``[S, C, H, W]``, a processor's output, or embeddings ``[S, D]``.
            labels: One label each; any hashable values. :attr:`labels` remembers them by row.
            similarity: As for the class; decides how supports are averaged
                (:func:`~fam_plugins.prototypes`).
            contrast: As for the class.
            chunk_size: Images per forward pass.
            **reading: ``output`` and ``forward_kwargs``, as for the class.

        Raises:
            ValueError: If there are more or fewer labels than images, and as for the class.

        Example:
            >>> import torch
            >>> encoder = nn.Flatten()
            >>> model = SimilarityModel.from_support(encoder, torch.eye(3), ["b", "a", "a"])
            >>> model.labels, model.references.shape
            (('a', 'b'), torch.Size([2, 3]))
        """
        as_similarity(similarity)
        encoder = as_encoder(encoder)
        given = tensors_of(images, "supports")[0]
        names = listed(labels, len(given) if given.dim() else 0)
        supports = embed_once(encoder, images, "supports", chunk_size, **reading)
        return cls(
            encoder,
            prototypes(supports, names, similarity),
            similarity=similarity,
            contrast=contrast,
            chunk_size=chunk_size,
            labels=unique_labels(names),
            **reading,
        )

    @classmethod
    def from_text(
        cls,
        model: nn.Module,
        tokenizer: Any,
        captions: Sequence[str],
        templates: str | Sequence[Template] | None = None,
        *,
        chunk_size: int = 32,
        **options: Any,
    ) -> SimilarityModel:
        """Compare images with captions: one reference per caption, embedded once by the model.

        A score is the cosine of image and caption; the model's own logit scale and bias, the same
        for every caption and region, are kept out of scores and maps. ``contrast="others"`` asks
        "why this caption, not the others".

        Args:
            model: Of open_clip, or transformers' CLIPModel, SiglipModel and their like.
            tokenizer: ``open_clip.get_tokenizer(name)``, or transformers' processor or tokenizer.
                Longer texts than the model takes are cut.
            captions: They become :attr:`labels`.
            templates: Such as ``"a photo of a {}."``, or functions of a caption: their texts' unit
                vectors are averaged (CLIP, arXiv 2103.00020). By default the caption is the text.
            chunk_size: Texts per forward pass.
            **options: As for the class, such as ``contrast``.

        Raises:
            TypeError: If captions are no list of strings, or the tokenizer is none.
            ValueError: If the model lacks a tower, a caption is empty, or a template has no ``{}``.

        Example:
            >>> clip = open_clip.create_model("ViT-B-32", "laion2b_s34b_b79k")  # doctest: +SKIP
            >>> tokenizer = open_clip.get_tokenizer("ViT-B-32")  # doctest: +SKIP
            >>> model = SimilarityModel.from_text(  # doctest: +SKIP
            ...     clip, tokenizer, ["a cat", "a dog"], "a photo of {}.", contrast="others"
            ... )
        """
        rows = embed_captions(model, tokenizer, captions, templates, chunk_size)
        return cls(model, rows, labels=captions, chunk_size=chunk_size, **options)

    def index(self, label: Any) -> Any:
        """The row of a label; of a list of labels, a list of rows.

        Raises:
            ValueError: If no row has this label (the message names the closest), or several have.

        Example:
            >>> import torch
            >>> SimilarityModel(nn.Flatten(), torch.eye(2), labels=["cat", "dog"]).index("dog")
            1
        """
        if isinstance(label, list):
            return [self.index(one) for one in label]
        if self.labels is None:
            raise ValueError("pass an int: the references have no labels; labels=[...] gives them")
        rows = [row for row, known in enumerate(self.labels) if known == label]
        if not rows:
            raise ValueError(unknown_name("label", label, map(str, self.labels)))
        if len(rows) > 1:
            raise ValueError(f"label {label!r} is that of rows {rows}: pass the row that you mean")
        return rows[0]

    @property
    def contrast(self) -> Contrast:
        """What is subtracted: embeddings ``[M, D]`` or their mean, ``"others"``, or ``None``."""
        return "others" if self._others else self._against

    @property
    def _against(self) -> Tensor | GalleryMean | None:
        if self.contrast_embeddings is None or self.contrast_terms is None:
            return self.contrast_embeddings
        return GalleryMean(self.contrast_embeddings, self.contrast_terms, self.similarity)

    def embed(self, images: Tensor | Mapping[str, Any], *further: Any) -> Tensor:
        """Embed images ``[B, ...]`` -> ``[B, D]``, with gradient, in the current mode.

        Images may be a processor's output. ``further`` are arguments of the encoder behind them.

        Raises:
            TypeError: If the encoder returns neither a tensor nor an object with a field to take.
            ValueError: If the batch is empty, or the encoder returns no ``[B, D]``.

        Example:
            >>> import torch
            >>> SimilarityModel(nn.Flatten(), torch.eye(2)).embed(torch.ones(1, 2, 1)).shape
            torch.Size([1, 2])
        """
        return embed(self.encoder, images, *further, **self._reading)

    def score(self, embeddings: Tensor, rows: Tensor | None = None) -> Tensor:
        """Score embeddings ``[B, D]`` against the references, or against some rows of them.

        Args:
            embeddings: ``[B, D]``.
            rows: Indices of references ``[n]``; all by default. ``contrast="others"`` means the
                others of all references, whichever rows are asked for.

        Returns:
            ``[B, n]``.

        Raises:
            ValueError: If the embeddings have another width than the references, are not finite.

        Example:
            >>> import torch
            >>> model = SimilarityModel(nn.Flatten(), torch.eye(3), similarity="dot")
            >>> model.score(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([2, 0]))
            tensor([[3., 1.]])
        """
        if not (rows is None or isinstance(rows, Tensor)):
            rows = as_tensor(rows, "rows")
        coupled = not self._similarity.by_reference or (self._others and self._against is None)
        if rows is None or coupled:
            scores = self._against_all(embeddings)
            return scores if rows is None else scores[:, rows]
        return self._score(embeddings, self._rows(rows, embeddings))

    def _rows(self, rows: Tensor, like: Tensor) -> Tensor:
        if isinstance(self.references, Gallery):
            return self.references.rows(rows, like=like)
        return self.references[rows.to(self.references.device, non_blocking=True)]

    def _score(self, embeddings: Tensor, references: Tensor) -> Tensor:
        against = self._against
        scores = score(self._similarity, embeddings, references, against)
        if self._others and against is not None:
            # A mean over all holds the one itself: what is left is this much less than to the rest.
            scores = scores * (len(self.references) / (len(self.references) - 1))
        return scores

    def _against_all(self, embeddings: Tensor) -> Tensor:
        if isinstance(self.references, Gallery):
            parts = self.references.chunks(like=embeddings)
            scores = torch.cat([self._score(embeddings, part) for part in parts], dim=1)
        else:
            scores = self._score(embeddings, self.references)
        return subtract_others(scores) if self._others and self._against is None else scores

    def forward(self, images: Tensor | Mapping[str, Any], *further: Any) -> Tensor:
        """Images ``[B, ...]`` -> scores ``[B, N]`` of ``N`` references; errors as :meth:`score`."""
        return self.score(self.embed(images, *further))

    def get_extra_state(self) -> Tensor:
        """What ``state_dict`` carries beside references: the meaning of the scores, in bytes."""
        meaning = f"{self.similarity} with {self._contrast_kind()}"
        return torch.tensor(list(meaning.encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse a ``state_dict`` whose scores mean something else.

        Raises:
            ValueError: If it is of another similarity or kind of contrast.
        """
        saved, own = (bytes(part.tolist()).decode() for part in (state, self.get_extra_state()))
        if saved != own:
            raise ValueError(
                f"the state is of a model that scores by {saved}, and this one by {own}: build the "
                "model as it was saved"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}_extra_state" in state_dict:  # before any value is overwritten
            self.set_extra_state(state_dict[f"{prefix}_extra_state"])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Show the number of references, their width, the similarity and the contrast."""
        count, width = self.references.shape
        kind = self._contrast_kind()
        return f"references={count}x{width}, similarity={self.similarity}, {kind}"

    def _contrast_kind(self) -> str:
        if self.contrast is None:
            return "no contrast"
        mean = isinstance(self.contrast, GalleryMean)
        return f"{'others' if self._others else 'a mean' if mean else 'embeddings'} as contrast"


class ModelScores:
    """The scores of a model, from as little of it as they need.

    A :class:`SimilarityModel` ends here in its embedding ``[B, D]``, from which only the wanted
    references are scored. Any other model ends in what it returns.

    ``pick`` selects scores ``[B]`` out of ``[B, N]`` for :meth:`select`. ``forward`` is what to
    call instead of ``forward_func``, and returns the end; ``model`` is the similarity model, or
    ``None``.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        pick: Callable[[Any], Tensor] = torch.as_tensor,
        batch: int | None = None,
    ) -> None:
        self.model: SimilarityModel | None = None
        self.forward = forward_func
        self._pick = pick
        kind: Any = type(forward_func)
        if hasattr(forward_func, "main_input_name"):  # of transformers: its logits or embeddings
            call: Any = getattr(forward_func, "get_image_features", forward_func)
            self.forward = lambda *x: pick_embeddings(getattr(out := call(*x), "logits", out))
        # A subclass with a forward of its own may do anything with the scores.
        if isinstance(forward_func, SimilarityModel) and kind.forward is SimilarityModel.forward:
            self.model = forward_func
            self.forward = forward_func.embed
            if batch is not None:
                # Before any work: what no output has is refused here.
                rows = forward_func.references
                like = rows if isinstance(rows, Tensor) else next(forward_func.parameters(), None)
                device = "cpu" if like is None else like.device
                # Autograd refuses to index with tensors of inference mode.
                with torch.inference_mode(False):
                    numbers: Any = torch.arange(len(rows), device=device).expand(batch, -1)
                    numbers.row_of = forward_func.index  # a target may be a label
                    self._chosen = pick(numbers)

    def select(self, end: Any) -> Tensor:
        """The score ``[B]`` that was picked, from what :attr:`forward` returned."""
        if self.model is None:
            return self._pick(end)
        return self.model.score(end, self._chosen).diagonal()
