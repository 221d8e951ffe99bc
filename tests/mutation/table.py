"""The mutants: a line of the package, what it becomes, and the tests that ought to notice.

Each is one plausible slip: a dropped argument, a swapped order, a bound that is off by one, a
default that differs. Mutants that change nothing a user could see do not belong here.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """``old`` stands in the file exactly once; the tests run with ``new`` in its place."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) or "nothing" for text in (self.old, self.new))
        return f"{self.file}: {old} -> {new}"


def of(file: str, tests: str, *changes: tuple[str, str]) -> list[Mutant]:
    """Mutants of ``fam_plugins/<file>``, each run against ``tests/<test>`` of a list of words."""
    paths = tuple(f"tests/{test}" for test in tests.split())
    return [Mutant(f"fam_plugins/{file}", old, new, paths) for old, new in changes]


SIMILARITY = of(
    "core/similarity.py",
    "core/test_similarity.py core/test_references.py core/test_distances.py",
    (', compute_mode="donot_use_mm_for_euclid_dist"', ""),
    ("scale = at.detach().abs().amax(dim=1, keepdim=True)", "scale = at.new_ones(len(at), 1)"),
    ('scale = scale.masked_fill(scale == 0, float("inf"))', "pass"),
    ("return value + self._checked(change, embeddings, references)",
     "return self._checked(change, embeddings, references)"),
    ("self.linear(embeddings - point, references", "self.linear(embeddings, references"),
    ("return unit_length(embeddings, frozen_at) @", "return unit_length(embeddings) @"),
    ("return 2 * embeddings @ references.T", "return embeddings @ references.T"),
    ("distance > 0, 0.5 / distance", "distance > 0, 1 / distance"),
    ("0.5 / distance, torch.zeros_like(distance)", "0.5 / distance, 0.5 / distance"),
    ('Similarity("cosine", _cosine, _cosine_linear, scale_free=True,',
     'Similarity("cosine", _cosine, _cosine_linear,'),
    ("both.linear, scale_free=True, averages", "both.linear, averages"),
    ("rtol=1e-6)", "rtol=1e-1)"),
    ("elif distance.power not in ((1,) if inverted else (1, 2)):", "elif distance.power > 2:"),
    ("return unit_length(references) if self.references_too else references",
     "return references"),
    ("if distance.p != 2:", "if distance.p > 2:"),
    ('name = getattr(given, "__name__", type(given).__name__)', 'name = type(given).__name__'),
)  # fmt: skip

SCORES = of(
    "core/scores.py",
    "core/test_similarity.py core/test_similarity_model.py core/test_maps.py core/test_own_norm.py",
    ("wide = torch.promote_types(given, torch.float32)", "wide = given"),
    ("with full_precision(embeddings.device):", "if True:"),
    ("contrast.to(wide)).mean(dim=1", "contrast).mean(dim=1"),
    ("others / (scores.shape[1] - 1)", "others / scores.shape[1]"),
    ("frozen.contrasted = True", "pass"),
    ("if given == torch.float16:", "if given == torch.bfloat16:"),
    ("if frozen is not None and frozen.freeze:", "if frozen is not None:"),
    ("        return embeddings, point\n", "        return embeddings, embeddings.detach()\n"),
    ("embeddings = embeddings * (length / noted)", "pass"),
    ("frozen._replay = iter(frozen.points) if replay else None", "frozen._replay = None"),
    ("self.points.append((embeddings.detach(), length))",
     "self.points.append((embeddings, length))"),
    ("ACTIVE.reset(token)", "pass"),
    ("doubt(~finite.all(), refuse)", "doubt(~finite.any(), refuse)"),
    ("        _settle(frozen.doubts or [])\n", ""),
    ("raise consequence", "pass"),
    ("if shape[0] != count:", "if shape[0] > count:"),
    ("(embeddings.detach() == 0).all(dim=1)", "(embeddings.detach() == 0).any(dim=1)"),
)  # fmt: skip

REFERENCES = of(
    "core/references.py",
    "core/test_references.py core/test_contrast.py core/test_similarity_model.py",
    ("    with eval_mode(encoder):\n        return mean_of",
     "    if True:\n        return mean_of"),
    ("        yield from Gallery(loader).parts()\n        return\n", "        pass\n"),
    ("    contrast.check(similarity)\n", ""),
    ('check_embeddings(contrast.row, width=width, what="contrast")', "pass"),
    ("unit_length(wide).to(embeddings.dtype)", "unit_length(wide)"),
    ("wide = supports.to(torch.promote_types(supports.dtype, torch.float32))", "wide = supports"),
    ("return sorted(distinct)", "return distinct"),
    ("            with eval_mode(encoder):\n", "            if True:\n"),
    ("embed(encoder, *chunk, **reading).clone()", "embed(encoder, *chunk)[:1].clone()"),
    ("found = given.clone()", "found = given"),
    ("dtype=dtype or given.dtype)", "dtype=dtype or torch.float32)"),
    ("if np.ma.isMaskedArray(values):", "if False:"),
)  # fmt: skip

TAILS = of(
    "core/maps.py",
    "core/test_tails.py",
    ('"norms": {"attention": False, "gates": False}', '"norms": {}'),
    ("self.rule.tail if tail is None else tail", "self.rule.tail"),
    ("self._constants = self._pass.behind = TailConstants", "self._constants = TailConstants"),
    ("shares = (tokens * gradient[:, :skip]).sum(dim=2)", "shares = tokens.sum(dim=2)"),
    ("        if self._cut:\n", "        if False:\n"),
)  # fmt: skip
TAILS += of(
    "core/maps.py",
    "core/test_choose_layer.py core/test_decompose.py",
    (
        "sums = maps.sum(dim=(2, 3))",
        "sums = (maps - maps.mean(dim=-1, keepdim=True)).sum(dim=(2, 3))",
    ),
    ("self.sums.append(torch.stack(sums).sum(dim=0))", "self.sums.append(sums[-1])"),
)
TAILS += of(
    "core/frozen_tail.py",
    "core/test_tails.py",
    ('return "_orig_mod" in inside or getattr', "return getattr"),
    ("part = getattr(part, step, None)", "pass"),
    ('"_compiled_call_impl", None) is not None', '"_compiled_call_impl", None) is False'),
)
TAILS += of("core/rules.py", "core/test_tails.py", ('tail="norms",', 'tail="frozen",'))
TAILS += of(
    "captum/layer_fam.py",
    "core/test_tails.py core/test_decompose.py",
    ("        parts |= one.constants\n", "        pass\n"),
    ('        parts["offset"] = offset\n', "        pass\n"),
    ("            tail=self.tail,\n", ""),
)
TAILS += of("grad_cam/fam.py", "core/test_tails.py", ("            tail=self.tail,\n", ""))

CONTRAST = of(
    "core/contrast.py",
    "core/test_contrast.py",
    ("@torch.inference_mode(False)\n", ""),
    ("@torch.no_grad()\n", ""),
    ("rows = part.detach().cpu().double()", "rows = part.detach().cpu()"),
    ("(unit_length(rows) if similarity.scale_free else rows).sum", "rows.sum"),
    ("row.norm() if similarity.scale_free else torch.ones_like(total[0])", "row.norm()"),
    ("row.norm() if similarity.scale_free else torch.ones_like(total[0])",
     "torch.ones_like(total[0])"),
    ("- weight * similarity.scores(one, row)[0, 0]", "- similarity.scores(one, row)[0, 0]"),
    ("torch.promote_types(like.dtype, torch.float32)", "like.dtype"),
    ("if similarity.averages else embeddings", "if similarity.linear else embeddings"),
)  # fmt: skip

OWN_NORM = of(
    "core/own_norm.py",
    "core/test_own_norm.py",
    ("    node.register_hook(hold)\n", ""),
    ("kept if i == place else found", "found"),
    ("Unbind|", ""),
    ("is_norm = (is_unit | (rows == 0).all(dim=1)).all()", "is_norm = is_unit.any() | True"),
    ("        place = 0\n", "        pass\n"),
    ('lengths if node.name() == "DivBackward0" else 1 / lengths', "lengths"),
)

DECOMPOSE = of(
    "core/decompose.py",
    "core/test_decompose.py core/test_choose_layer.py",
    ("least = 0.5", "least = 0.3"),
    ("else 0.1", "else 0.9"),
    ("rule.centred and TOKENS & {*constants}", "rule.centred"),
    ("if most in TOKENS:", "if False:"),
    ("next(pair for pair in pairs if pair[2].any())", "pairs[0]"),
    (".sum(dim=0) - score", ".sum(dim=0) - score.abs()"),
    ('parts["regions"] / score', 'score / parts["regions"]'),
)

SMOOTH = of(
    "core/smooth.py",
    "core/test_smooth.py",
    ("maps.narrow(dim, 0, 1), maps.narrow(dim, 0, size - 1)",
     "maps.narrow(dim, size - 1, 1), maps.narrow(dim, 0, size - 1)"),
    ("2 * maps", "maps"),
)  # fmt: skip

RULES = of(
    "core/rules.py",
    "core/test_rules.py",
    ("(low != 0).to(low))", "torch.ones_like(low))"),
    ("(low != 0).to(low))", "torch.zeros_like(low))"),
    ("activations.sum(dim=2)[:, None]", "activations.amax(dim=2)[:, None]"),
    ("return gradients.mean(dim=3, keepdim=True)", "return gradients.sum(dim=3, keepdim=True)"),
    ("if shape not in ((*wanted, 1), (*wanted, regions)):", "if shape[:-1] != wanted:"),
    ("            centred=True,\n", ""),
)  # fmt: skip
RULES += of("core/maps.py", "core/test_rules.py",
            ("maps - maps.mean(dim=-1, keepdim=True)", "maps - maps.mean()"))  # fmt: skip
RULES += of(
    "core/rules.py",
    "contracts/test_identities.py",
    ('Rule("gradcam", _mean_gradient, frozen=False,', 'Rule("gradcam", _mean_gradient,'),
)

MAPS = of(
    "core/maps.py",
    "core/test_maps.py core/test_transforms.py captum/test_layer_fam.py test_pair.py",
    ("wide = torch.promote_types(activation.dtype, torch.float32)", "wide = activation.dtype"),
    ("with torch.no_grad(), full_precision(activation.device):", "with torch.no_grad():"),
    ("maps.to(activation.dtype).contiguous()",
     "maps.to(activation.dtype)"),
    ("~torch.isfinite(attribution).all()", "torch.isnan(attribution).any()"),
    ("tensors[0].any() & ~arranged.any()", "~arranged.any()"),
    ("at_input=self._at_input, **options)", "**options)"),
    ("        with self.replayed():\n", "        if True:\n"),
    ("torch.set_rng_state(cpu)", "pass"),
    ("self.scores = scores.detach()", "self.scores = scores"),
    ("len(shape) < 2 + self._regions", "len(shape) < 2"),
    ("or shape[0] != batch:", "or False:"),
    ("if len(maps) > 1 and self._regions:", "if False:"),
    ("torch.ones_like(scores)[None], **grad_kwargs)", "torch.ones_like(scores)[None])"),
    ("torch.cat(self._noted.zero)[: len(self.activations[0][0])]", "torch.cat(self._noted.zero)"),
    ("(tensor.shape for tensor in inputs if tensor.dim() == 4)",
     "(tensor.shape for tensor in inputs)"),
)  # fmt: skip

MANY = of(
    "core/many.py",
    "core/test_many.py",
    ("eps = 16 * torch.finfo", "eps = 1e4 * torch.finfo"),
    (" or end.dtype not in (torch.float32, torch.float64):", ":"),
    ("if chosen.shape[1] > 1 else None", ""),
    ("share.nan_to_num(0)", "share"),
    ("next(compress(found, proved), None)", "found[-1]"),
    ("(found.transpose(0, 1).flatten(2) * share)", "found.transpose(0, 1).flatten(2)"),
    ("torch.split(chosen, per_chunk, dim=1)", "torch.split(chosen, per_chunk + 1, dim=1)"),
    ("torch.split(indices, _IMAGES)", "torch.split(indices, _IMAGES - 1)"),
    ("if low < 0:", "if low < -1:"),
    ("if count is not None and high >= count:", "if count is not None and high > count:"),
    ("torch.Generator().manual_seed(0)", "None"),
    ("        with one.frozen():\n", "        if True:\n"),
    ("        _check_range(indices, count)\n", "        pass\n"),
)  # fmt: skip

LAYER_PASS = of(
    "core/layer_pass.py",
    "core/test_layer_pass.py captum/test_layer_fam.py contracts/test_explainer_contract.py",
    ("if g is None else g.detach()", "if g is None else g"),
    ('for name in (layer, f"encoder.{layer}"):', 'for name in (f"encoder.{layer}", layer):'),
    ("and all(grad is None for grad in grads):", "and False:"),
    ("return tensor.detach().requires_grad_()", "return tensor.requires_grad_()"),
    ("if self._tracking and tensor.requires_grad:", "if False:"),
    ("parts[i] = tensor.clone()", "parts[i] = tensor"),
    ("if not output.requires_grad:", "if False:"),
    ("                handle.remove()", "                pass"),
    ("        if layer in self._kept:\n", "        if False:\n"),
    ('grad_kwargs.setdefault("allow_unused", True)', 'grad_kwargs["allow_unused"] = True'),
)  # fmt: skip
LAYER_PASS += of(
    "core/layer_pass.py",
    "core/test_maps.py",
    ('if hasattr(given, "_fields"):', "if False:"),
)

TRANSFORMS = of(
    "core/layer_pass.py",
    "core/test_transforms.py",
    ("return abs(h * width - w * height) <= max(height, width)",
     "return abs(h * width - w * height) < max(height, width)"),
    ("return abs(h * width - w * height) <= max(height, width)",
     "return abs(h * width - w * height) <= 3 * max(height, width)"),
) + of(
    "core/transforms.py",
    "core/test_transforms.py",
    ("kinds = prefix_of(model, layer)", 'kinds = {"class token": 1}'),
    ("else (fixed, seen):", "else (seen, fixed):"),
    ("if first and not (last and type(layer) is nn.LayerNorm):", "if first:"),
    ("    if _puts_channels_second(layer, given):", "    if False:"),
    ("list(dict.fromkeys(outer))[::-1]", "list(dict.fromkeys(outer))"),
    ('p - 1 if getattr(embed, "dynamic_img_pad", False) else 0', "0"),
    ("for skip in dict.fromkeys((prefix, 0))", "for skip in (prefix,)"),
    ("return grid.permute(0, 3, 1, 2)", "return grid.permute(0, 3, 2, 1)"),
    ("size[1] + up[1]) // patch[1]", "size[0] + up[1]) // patch[1]"),
    ("if images is None or len(images) != 4 or len(given) not in (3, 4):",
     "if images is None or len(given) not in (3, 4):"),
    ("with eval_mode(model):", "if True:"),
)  # fmt: skip

ENCODERS = [
    *of(
        "core/encoders.py",
        "core/test_encoders.py",
        ("        return encoder.encode_image\n", "        return encoder\n"),
        ("        return encoder.get_image_features\n", "        return encoder\n"),
        ('("image_embeds", "text_embeds", "pooler_output")',
         '("pooler_output", "text_embeds", "image_embeds")'),
        ("and found.shape[2:] == (1, 1)", "and found.dim() == 4"),
        ('"pixel_values", "pixel_attention_mask", "spatial_shapes"',
         '"pixel_attention_mask", "pixel_values", "spatial_shapes"'),
        (' and hasattr(model, "encode_text")', ""),
        ('takes != "pixel_values" or ', ""),
        ("    image_call(given)\n", ""),
    ),
    *of(
        "core/encoders.py",
        "core/test_metric_learning.py",
        ('if parts.get("normalize_embeddings"):', "if False:"),
        ('if parts.get("normalize_embeddings"):', "if True:"),
        ("return F.normalize(embeddings)", "return F.normalize(embeddings, p=1)"),
        ('        given.training = parts["trunk"].training\n', ""),
        ('("trunk", "embedder") if', '("embedder", "trunk") if'),
        (" if parts.get(name) is not None]", "]"),
    ),
    *of(
        "core/scores.py",
        "core/test_episodes.py core/test_lightly.py",
        ("two and not three and not hasattr", "two and not hasattr"),
        ("return two and not three", "return not three"),
        (' and not hasattr(getattr(encoder, "config", None), "num_frames")', ""),
        ("images.dim() == 5 and takes_images_only", "images.dim() >= 4 and takes_images_only"),
    ),
    *of(
        "core/encoders.py",
        "core/test_lightly.py",
        ("and found.shape[2:] == (1, 1)", "and found.dim() == 4"),
        ("return found.flatten(1) if", "return found if"),
    ),
    *of(
        "core/similarity_model.py",
        "core/test_episodes.py",
        ("prototypes(rows.unflatten(0, shots), similarity=chosen)",
         "prototypes(rows.unflatten(0, shots))"),
        ("rows.dim() == 5 and takes_images_only(encoder)", "rows.dim() == 5"),
    ),
    *of(
        "core/references.py",
        "core/test_episodes.py",
        (".repeat(embeddings.shape[1])", ".repeat(len(embeddings))"),
    ),
    *of(
        "core/references.py",
        "core/test_contrast.py cape/test_batches.py",
        ("len(pixels) == 1 and len(labels) < 2", "pixels"),
        ("len(pixels) == 1 and len(labels) < 2", "len(pixels) == 1"),
        ("*(images[name] for name in labels), *rest", "*rest"),
        ("return (images, *rest)", "return (images,)"),
    ),
    *of(
        "core/side.py",
        "core/test_metric_learning.py",
        ("    encoder = as_encoder(encoder)\n", ""),
    ),
    *of(
        "quality/evaluate.py",
        "core/test_metric_learning.py",
        ("    encoder = as_encoder(encoder)\n", ""),
    ),
    *of(
        "core/captions.py",
        "core/test_captions.py",
        ("unit_length(rows.to(", "(rows.to("),
        ("return unit_length(means)", "return (means)"),
        ('"padding": "max_length"', '"padding": "longest"'),
        ("with eval_mode(model), ", "with "),
        (".reshape(len(captions), -1, units.shape[1]).mean(dim=1)",
         ".reshape(-1, len(captions), units.shape[1]).mean(dim=0)"),
        (' or hasattr(tokenize, "image_mean")', ""),
    ),
    *of(
        "core/transforms.py",
        "core/test_encoders.py",
        ("for given in (*sizes, image):", "for given in (image, *sizes):"),
        ("if strict and len(", "if len("),
        ("(-(-side // (by << stage))", "(side // (by << stage)"),
        (" or not all(flags))", ")"),
        ("image_call(model)(example_input)", "model(example_input)"),
    ),
    *of(
        "core/similarity_model.py",
        "core/test_encoders.py core/test_captions.py",
        ("embed(self.encoder, images, *further, **self._reading)",
         "embed(self.encoder, images, *further)"),
        ('getattr(forward_func, "get_image_features", forward_func)', "forward_func"),
        ('getattr(out := call(*x), "logits", out)', "call(*x)"),
        ("if len(rows) > 1:", "if False:"),
    ),
    *of(
        "core/references.py",
        "core/test_encoders.py",
        ("for t in (given, *further)]", "for t in (given,)]"),
        ('"contrast", chunk_size, width=width, **reading)', '"contrast", chunk_size, width=width)'),
    ),
]  # fmt: skip

OTHERS_OF_CORE = [
    *of(
        "core/choose_layer.py",
        "core/test_choose_layer.py",
        ("    if layer in names.values():\n        return layer\n", ""),
        ("images[:1])", "images)"),
        ("max(first - (cuts[first - 1].regions <= cuts[first].regions), 0)", "first"),
        ("(cuts[first - 1].regions <= cuts[first].regions), 0)", "1, 0)"),
        ("(cuts[first - 1].regions <= cuts[first].regions), 0)", "1, -1)"),
        ("found[:, found.shape[1] // 2 :].any()", "found.any()"),
        ("max(middle, joins, 0)", "middle"),
        ("[len(blocks) // 2] - 1", "[len(blocks) // 2]"),
        ("sizes[kind] > 0, ", ""),
        ("found[0].grad_fn, found[0].output_nr", "found[0].grad_fn, 0"),
        ("eval_mode(root), torch", "torch"),
        ("requires_grad_().clone()", "requires_grad_()"),
        (" or _reaches(end, source, edge):", ":"),
        ("ran[m] == 1 and inner", "inner"),
        (" and inner in {*m.modules()}]", "]"),
        ("Cut(around[-1], inner", "Cut(inner, inner"),
        ("(nn.AvgPool2d, nn.AdaptiveAvgPool2d, *", "(*"),
        ("*[nn.Linear] * any(cut.tokens for cut in cuts)", ""),
        (" * any(cut.tokens for cut in cuts)", ""),
        ("min(regions, output.shape[2:].numel())", "regions"),
        ("min(regions, output.shape[2:].numel())", "2"),
    ),
    *of(
        "core/gallery.py",
        "core/test_gallery.py",
        ("np.arange(start, start + len(part))", "np.arange(len(part))"),
        ("max(1, self.values_per_part // self.shape[1])", "max(1, self.values_per_part)"),
        (" or array.dtype.itemsize > 8:", ":"),
        ('part.astype(part.dtype.newbyteorder("="), copy=False)', "part"),
        ("bad = ~torch.isfinite(rows).all(dim=1)", "bad = torch.isnan(rows).any(dim=0)"),
        ("return self._checked(np.array(self.array[wanted]), wanted, like)",
         "return self._checked(np.array(self.array[: wanted.max() + 1][wanted]), wanted, like)"),
        ("    def __deepcopy__(self", "    def _deepcopy(self"),
    ),
    *of(
        "core/similarity_model.py",
        "core/test_similarity_model.py core/test_many.py core/test_gallery.py "
        "core/test_contrast.py",
        ("similarity=similarity,\n            contrast=contrast,\n            chunk_size",
         "similarity=similarity,\n            chunk_size"),
        ('embed_once(encoder, images, "supports", chunk_size, **reading)',
         'embed_once(encoder, images, "supports", **reading)'),
        ("            labels=unique_labels(names),\n", ""),
        (" and kind.forward is SimilarityModel.forward:", ":"),
        ("not self._similarity.by_reference or (self._others and self._against is None)", "False"),
        ("subtract_others(scores) if self._others and self._against is None else scores", "scores"),
        ("(len(self.references) / (len(self.references) - 1))", "1"),
        ("self.training = encoder.training", "pass"),
        ("if saved != own:", "if False:"),
        ("embeddings, references, against)", "embeddings, references)"),
    ),
    *of(
        "core/eval_mode.py",
        "core/test_eval_mode.py core/test_references.py",
        ("if not _held[part]:", "if True:"),
        ("part.training = True", "pass"),
        ("if p.training or p in _held]", "if p.training]"),
        ("chain(module.parameters(), module.buffers())", "module.parameters()"),
    ),
]  # fmt: skip

CAPTUM = [
    *of(
        "captum/layer_fam.py",
        "captum/test_layer_fam.py core/test_many.py",
        ("device_ids: list[int] | None = None,\n        *,\n",
         "device_ids: list[int] | None = None,\n"),
        (", **(grad_kwargs or {})}", "}"),
        ("            additional_forward_args,\n            attribute_to_layer_input,\n",
         "            additional_forward_args,\n"),
        ("references_per_chunk: int = 64", "references_per_chunk: int = 1"),
        ("scores.forward, inputs, None, further)", "scores.forward, inputs, None, None)"),
        ("return result, Decomposition.of(maps, _parts(one, maps",
         "return result, Decomposition.of(maps, _parts(one, (result,)"),
        ("difference: Tensor = delta + region_sum(attributions) - region_sum(maps)",
         "difference: Tensor = delta"),
        ('"sum_channels": attr_dim_summation', '"sum_channels": True'),
    ),
    *of(
        "captum/layer_cape.py",
        "captum/test_layer_cape.py",
        ("scores = select_scores(output, target)", "scores = output.amax(1)"),
        ("return maps, maps.flatten(1).sum(dim=1) - own.exp()",
         "return maps, maps.flatten(1).sum(dim=1) - own"),
    ),
    *of(
        "captum/targets.py",
        "captum/test_layer_fam.py",
        ("wrong = [t for t in chosen if not (-count if single else 0) <= t < count]",
         "wrong = [t for t in chosen if not -count <= t < count]"),
        ("return scores.reshape(len(scores)) if scores.dim() > 0 else scores", "return scores"),
    ),
]  # fmt: skip

GRAD_CAM = [
    *of(
        "grad_cam/base.py",
        "grad_cam/test_fam.py contracts/test_explainer_contract.py",
        ("        input_tensor = input_tensor.to(self.device)\n", ""),
        ("            self.attributions = None\n", "            pass\n"),
        ("with eval_mode(self._cam.model):", "if True:"),
        ("resized = scale_cam_image(np.maximum(cams, 0)", "resized = scale_cam_image((cams)"),
        ("        finally:\n            self.activations_and_grads.release()",
         "        finally:\n            pass"),
        ("if len(targets) != count:", "if len(targets) < count:"),
    ),
    *of(
        "grad_cam/fam.py",
        "grad_cam/test_fam.py core/test_maps.py",
        ('reshape_transform: Callable[[Any], Tensor] | str | None = "auto",\n        *,\n',
         'reshape_transform: Callable[[Any], Tensor] | str | None = "auto",\n'),
        ("        input_tensor = input_tensor.to(self.device)\n", ""),
        ("with eval_mode(self.model), (one", "with (one"),
        ("sum_channels=not eigen_smooth", "sum_channels=True"),
    ),
    *of(
        "grad_cam/target.py",
        "grad_cam/test_fam.py",
        ("as_tensor(embeddings, what).detach().clone()", "as_tensor(embeddings, what).detach()"),
        ("with torch.inference_mode(False):", "if True:"),
        ("reference, contrast)[:, 0]", "reference)[:, 0]"),
    ),
]  # fmt: skip

CAPE = [
    *of(
        "cape/head.py",
        "cape/test_head.py cape/test_released.py",
        ("bound = 1 / math.sqrt(self.in_channels)", "bound = 1 / self.in_channels"),
        ("for log_temperature in (self.t1, self.t2, self.t3):",
         "for log_temperature in (self.t1, self.t2):"),
        ("head.to_empty(device=weight.device)", 'head.to_empty(device="cpu")'),
        ('device="meta", dtype=weight.dtype)', 'device="meta")'),
        ("torch.promote_types(torch.promote_types(logits.dtype, t1.dtype), torch.float32)",
         "torch.promote_types(logits.dtype, t1.dtype)"),
        ("classes.softmax(dim=2), weights.softmax(dim=1)",
         "classes.softmax(dim=2), weights.softmax(dim=0)"),
        ("logits.mean(dim=2, keepdim=True) * (-t2).exp()",
         "logits.mean(dim=2, keepdim=True) * (-t1).exp()"),
        ("return log_probabilities(classify_regions(self, features), self.t1, self.t2, self.t3)",
         "return log_probabilities(classify_regions(self, features), self.t1, self.t2)"),
    ),
    *of(
        "cape/loss.py",
        "cape/test_loss.py",
        ("if kind not in (torch.uint8,", "if kind not in (torch.bool, torch.uint8,"),
        ("    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))\n    loss",
         "    loss"),
        ("return temperature**2 * divergence", "return temperature * divergence"),
        ("student = head.soft_log_probs(features.detach())",
         "student = head.soft_log_probs(features)"),
    ),
    *of(
        "cape/calibrate.py",
        "cape/test_calibrate.py",
        ("low) * i / 20 for i in range(21)", "low) * i / 2 for i in range(3)"),
        ("sorted({0.0, *(low", "sorted({*(low"),
        ("for i in range(21))", "for i in range(20))"),
        ("head.t3.sub_(shift)", "head.t3.add_(shift)"),
    ),
    *of(
        "cape/fit.py",
        "cape/test_fit.py",
        ("lr: float = 1e-3", "lr: float = 1e-2"),
        ("step_size: int = 30", "step_size: int = 3"),
        ("temperature: float = 2.0", "temperature: float = 4.0"),
        ("head.load_state_dict(last_good)", "pass"),
    ),
    *of(
        "cape/checkpoint.py",
        "cape/test_checkpoint.py",
        ("for tensor in linear.state_dict().values():", "for tensor in [linear.weight]:"),
    ),
    *of(
        "cape/model.py",
        "cape/test_model.py",
        ("if len(caught) != 1:", "if len(caught) < 1:"),
        ("converted.training = converted.feature_map.training = model.training", "pass"),
        ("head.train(model.training)", "head"),
        ("if len(heads) != 1:", "if not heads:"),
        ("            return features.movedim(1, -1) if self.site.channels_last else features",
         "            return None"),
    ),
    *of(
        "cape/locate.py",
        "cape/test_locate.py",
        ("with eval_mode(model), torch.no_grad():", "with eval_mode(model):"),
        ("once = [call for call in maps if times[call.name] == 1]", "once = maps"),
        ("if last is None or not torch.equal(*(t.nan_to_num() for t in (last.linear[1], output))):",
         "if last is None:"),
    ),
    *of(
        "cape/upsample.py",
        "cape/test_upsample.py",
        ('mode: Literal["nearest", "bilinear"] = "nearest"',
         'mode: Literal["nearest", "bilinear"] = "bilinear"'),
    ),
]  # fmt: skip

INTEROP = [
    *of(
        "interop/easyfsl.py",
        "interop/test_easyfsl.py",
        ("rtol=1e-3, atol=1e-3 * float", "rtol=1e-1, atol=1e-1 * float"),
        ('self.register_buffer("centre", centre.detach().clone())',
         'self.register_buffer("centre", centre.detach().clone(), persistent=False)'),
        ("        self.training = backbone.training\n", ""),
        ('hasattr(classifier, "fine_tuning_steps")', "False"),
        ('"is_transductive", bool)()', '"no_transductive", bool)()'),
    ),
    *of(
        "interop/harnesses.py",
        "interop/test_harnesses.py",
        ("_at_size(attribution.attribute(images, **arguments), images, interpolate_mode)",
         "_at_size(attribution.attribute(images, **arguments), images)"),
        ("scores.argmax(dim=-1).tolist() if class_idx is None",
         "scores.argmin(dim=-1).tolist() if class_idx is None"),
        (" or classes.is_complex() or classes.dtype == torch.bool:", ":"),
        ("with method(model, [module], **options) as cam:", "with method(model, [module]) as cam:"),
        ("and len(part.references) == 1 for", "and len(part.references) <= 2 for"),
    ),
]  # fmt: skip

PLOTS = of(
    "plots/maps.py",
    "test_plots.py",
    ('"in the query": [asked] * len(found), "in the hit": found',
     '"in the hit": [asked] * len(found), "in the query": found'),
    ("numbers[i].argmax()", "numbers[i].argmin()"),
    ('and not re.search(r"\\.\\w+$", query)', ""),
)  # fmt: skip
PLOTS += of(
    "plots/figure.py",
    "test_plots.py",
    ("0.75 * share.abs()", "share.abs()"),
    ("share < 0, ends", "share > 0, ends"),
    ("aspect = max(image.shape", "aspect = min(image.shape"),
    ('origin="lower"', 'origin="upper"'),
    ("self.blend(values, torch.linspace(0, 1, 32, **steps).expand_as(values))",
     "self.blend(values, torch.ones_like(values))"),
    ("    def _repr_png_", "    def _repr_jpeg_"),
)  # fmt: skip

IMAGES = of(
    "core/images.py",
    "core/test_images.py",
    ("opened = ImageOps.exif_transpose(opened)", "pass"),
    ("if first and last:", "if False:"),
    ("return batch if first else batch.movedim(-1, 1)", "return batch"),
    ("batch = batch.float() * scale + center", "batch = (batch.float() + center) * scale"),
    ("if low >= 0 and 16 <= high <= 255:", "if low >= 0 and 2 <= high <= 255:"),
    ("reversed(found_inside)", "found_inside[:1]"),
    ("if transform is not None and not _normalised(images):", "if False:"),
    ("    if _normalised(images):\n        raise", "    if False:\n        raise"),
)  # fmt: skip

CLI = of(
    "cli/models.py",
    "cli/test_models.py cli/test_main.py",
    ("if names and stem not in names:", "if False:"),
    ("if not any(wanted in", "if False and not any(wanted in"),
    ('os.environ["HF_HUB_OFFLINE"] = "1"', "pass"),
    ("if missing or more:", "if missing:"),
    ("t.Resize(side * 8 // 7)", "t.Resize(side)"),
    ("return encoder.eval(), transform", "return encoder, transform"),
)  # fmt: skip
CLI += of(
    "cli/sheet.py",
    "cli/test_sheet.py",
    ("<h2>{escape(query)}</h2>", "<h2>{query}</h2>"),
    ("at + 1, ArrowDown", "at - 1, ArrowDown"),
    ('tabindex="0"', ""),
)  # fmt: skip
CLI += of(
    "cli/commands.py",
    "cli/test_commands.py",
    (".argsort().flip(0)", ".argsort()"),
    ("if not file.samefile(query)", ""),
    ("part.replace(file)", "part.rename(file.with_suffix('.x'))"),
    ("sides = names, one.b, found.query_maps, found.hit_maps",
     "sides = names, one.b, found.hit_maps, found.query_maps"),
    ("made.suptitle(RANDOM", "print(RANDOM"),
)  # fmt: skip

HITS = of(
    "hits.py",
    "test_hits.py",
    ("both.a.explain(both.alike(hit))", "both.a.explain(both.alike(hit.flip(1)))"),
    ("both.b.explain(both.alike(both.a.point", "both.b.explain(both.alike(both.b.point"),
)  # fmt: skip
HITS += of(
    "pair.py",
    "test_hits.py",
    ("missing = margins - maps.sum(dim=(1, 2, 3))", "missing = -threshold + 0 * margins"),
    ("self.score >= threshold", "self.score > threshold"),
    ("if index is None and len(self.score) > 1:", "if False:"),
)  # fmt: skip
HITS += of(
    "verification.py",
    "test_hits.py",
    ("np.abs(accepted - rejected).argmin()", "np.abs(accepted).argmin()"),
    ("accepted <= false_accept_rate)[-1]", "accepted <= false_accept_rate)[0]"),
    ("threshold = (threshold + below.max()) / 2", "threshold = below.max()"),
    ("if at and len(below):", "if len(below):"),
)  # fmt: skip

PAIR = of(
    "core/side.py",
    "test_pair.py",
    ("    with eval_mode(encoder):\n", "    if True:\n"),
    ("score(how, mine[None], other[None], contrast)[0]", "score(how, mine[None], other[None])[0]"),
    ('options: Any = {"regions": 1, ', "options: Any = {"),
    ("against = reduced(how, side(contrast).point)",
     "against = embed_contrast(encoder, contrast, how)"),
    ("like(embeddings) - unlike(embeddings)", "unlike(embeddings) - like(embeddings)"),
    ("partial(pairwise, how, contrast=against)", "partial(pairwise, how)"),
    ("constant = of(torch.zeros_like(self.point))", "constant = 0 * of(self.point)"),
    ("with self._one.replayed(), torch.no_grad():", "with torch.no_grad():"),
)  # fmt: skip

QUALITY = of(
    "quality/measures.py",
    "quality/test_measures.py",
    ("maps.clamp_min(0)[:, None]", "maps[:, None]"),
    ("- hits * (hits + 1) / 2", "- hits * hits / 2"),
    ("(hits * misses)", "(hits * hits)"),
    ("shown == shown.amax", "shown >= 0.5 * shown.amax"),
    (".nan_to_num(0)", ""),
    ("ranks - ranks.mean(1, keepdim=True)", "ranks"),
    ("mixed = torch.rand(values.shape).argsort(1)",
     "mixed = torch.arange(100).expand_as(values)"),
    ("descending=True", "descending=False"),
    ("turn < count", "turn <= count"),
    ("((images, baseline), (baseline, images))", "((images, baseline), (images, baseline))"),
    ("self.values[label][measure] - self.values[against][measure]",
     "self.values[against][measure] - self.values[label][measure]"),
    ("[2.5, 97.5]", "[5, 95]"),
) + of(
    "quality/evaluate.py",
    "quality/test_evaluate.py",
    ("            weight.grad = None\n", ""),
    ("questions[0] = [tuple(map(_halved, batch)) for batch in questions[0]]", "pass"),
    ("given[:, ::2, ::2] if given.dim() == 3 else given", "given"),
    (", torch.random.fork_rng(devices=[])", ""),
    (", eval_mode(encoder)\n", ", torch.inference_mode(False)\n"),
    ("images.clone().requires_grad_()", "images.clone()"),
    ('shot if gallery else contrast, "others"', 'contrast if gallery else contrast, "others"'),
    ('shot if gallery else contrast, "others"', '"others", "others"'),
    ("partial(given, smooth=False) if smooth and own else given", "given"),
    ("return smoothed(maps, 2) if smooth else maps, adds_up", "return maps, adds_up"),
    ("inner, smooth = cam.get_cam_image, False", "inner, smooth = cam.get_cam_image, True"),
    ('if hasattr(cam, "attributions"):', "if False:"),
    ("cam.get_target_width_height = lambda _inputs: None", "pass"),
    ("gap if adds_up else gap * torch.nan", "gap"),
    ("inputs, mosaic[1], smooth", "inputs, targets, smooth"),
    ("if len(of) > shots]", "if len(of) >= shots]"),
    ("rows[k][shots:]) for k", "rows[k]) for k"),
    ("[cell].reshape(mosaics", "[other].reshape(mosaics"),
    (".permute(0, 3, 1, 4, 2, 5)", ".permute(0, 3, 2, 4, 1, 5)"),
    ('labels = getattr(dataset, "targets", None)', "labels = None"),
    ("image.shape[1] != image.shape[2]", "False"),
    ("image.shape != images[0].shape or ", ""),
    ("perturbation(partial(_scores, judge", "perturbation(partial(_scores, model"),
    (".argmax(1)", ".argmin(1)"),
    ("torch.from_numpy(fours[each, cell])", "torch.from_numpy(fours[each, other])"),
    ("module, inputs, targets, smooth)\n            shown",
     "module, inputs, targets.flip(0), smooth)\n            shown"),
)  # fmt: skip

EXPORT = of(
    "export.py",
    "export/test_map_model.py",
    ("if pooled is not None and one.is_affine(end, lengths, partial(run, images[:1])):",
     "if pooled is not None:"),
    ("slopes = slopes if lengths is None else slopes / lengths[:, None]", "pass"),
    ("Frozen(freeze=self.rule.frozen, traced=True)", "Frozen(freeze=True, traced=True)"),
    ("one.behind = differentiable(self.held)", "one.behind = differentiable(None)"),
    ("smoothed(maps, maps.dim() - 2) if smooth else maps", "maps"),
    ("if not len(self.matrix) and self.count > MOST:", "if False:"),
    ("if not gap <= allowed * found.first.abs().amax():", "if False:"),
    ("if images.shape[1:] != self.image_shape:", "if False:"),
    ("self.training = False", "pass"),
) + of(
    "core/trace.py",
    "export/test_map_model.py export/test_formats.py",
    ("graph.register_buffer(name, constant.detach())", "setattr(graph, name, constant)"),
    ("if isinstance(batch, int) or batch.node.maybe_as_int() is not None:", "if False:"),
    ("if func is F.adaptive_avg_pool2d and", "if False and"),
    ("with sdpa_kernel(SDPBackend.MATH), nullcontext()", "with nullcontext()"),
)  # fmt: skip

DATASET = of(
    "dataset/rows.py",
    "dataset/test_explain.py",
    ("scores.topk(self._top_k).indices", "(-scores).topk(self._top_k).indices"),
    ("(half := maps.half()).isinf().any()", "(half := maps.half()) is None"),
    ("self._fits = len(part) // 2", "self._fits = 1"),
    (".where(scores != 0, share)", ""),
) + of(
    "dataset/store.py",
    "dataset/test_explain.py dataset/test_kills.py",
    ("os.replace(hidden, path)", "os.replace(hidden, path.with_suffix('.x'))"),
    ("        differ = [key for key in {**old, **new} if old.get(key) != new.get(key)]",
     "        differ = []"),
    ("            hidden.unlink(missing_ok=True)", "            pass"),
    ("        while len(self._ahead) > ahead:", "        while False:"),
) + of(
    "dataset/explain.py",
    "dataset/test_explain.py",
    ("if name in seen:", "if False:"),
    ("if name not in store.done]", "]"),
    ('"generator": torch.Generator()', '"generator": None'),
    ("if not seen | store.done:", "if False:"),
)  # fmt: skip

MUTANTS = [
    *SIMILARITY, *SCORES, *REFERENCES, *CONTRAST, *OWN_NORM, *TAILS, *DECOMPOSE, *SMOOTH, *RULES,
    *MAPS, *MANY, *LAYER_PASS, *TRANSFORMS, *ENCODERS, *OTHERS_OF_CORE, *CAPTUM, *GRAD_CAM, *CAPE,
    *INTEROP, *IMAGES, *CLI, *PLOTS, *HITS, *PAIR, *QUALITY, *EXPORT, *DATASET,
]  # fmt: skip
