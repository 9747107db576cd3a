"""`llama4 inspect NAME`: a model's layers, its parameters, and the memory they take."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
from typing import Any

from llama4_jax.config import MODELS, ModelConfig

COMPONENTS = {
    "embedding": "token embedding",
    "unembedding": "output head",
    "attention": "attention",
    "dense": "dense feed-forward",
    "router": "routers",
    "shared": "shared experts",
    "experts": "routed experts",
    "norms": "norms",
}
"""Keys of the counts, and how the table names them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--json", action="store_true", help="print the same as JSON")


def run(args: argparse.Namespace) -> int:
    name = _find(args.name)
    summary = {"name": name} | describe(MODELS[name]())
    if args.json:
        print(json.dumps(summary, indent=2))
    else:
        _show(summary)
    return 0


def _find(given: str) -> str:
    name = given.replace("-", "_").lower()
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1, cutoff=0)[0]
        raise ValueError(f"no model {given!r}; the nearest is {near!r} (all: {', '.join(MODELS)})")
    return name


def describe(cfg: ModelConfig) -> dict[str, Any]:
    """Config, layers, parameters and bytes, counted in the tree that `Transformer` builds, not by a formula.

    A token's *active* parameters are all but the experts it does not visit: `experts_per_token` of E, the shared
    expert, and both embeddings. Bytes: 2 and 4 a weight; AdamW keeps two fp32 moments, 8 more.
    """
    counts = _count(cfg)
    pattern = []
    for i, kind in enumerate(cfg.pattern):
        sizes = {component: n for (layer, component), n in counts.items() if layer == i}
        parameters = sum(sizes.values())
        pattern.append({
            "attention": "local" if kind.local else "global",
            "positions": "RoPE" if kind.local else "NoPE",
            "feed_forward": "moe" if kind.moe else "dense",
            "experts": cfg.num_experts if kind.moe else 0,
            "parameters": parameters,
            "active_parameters": parameters - _idle(cfg, sizes.get("experts", 0)),
        })  # fmt: skip
    layers = [{"index": i} | pattern[i % cfg.period] for i in range(cfg.num_layers)]
    components = dict.fromkeys(COMPONENTS, 0)
    for (layer, component), n in counts.items():
        components[component] += n if layer is None else n * cfg.num_blocks
    total = sum(components.values())
    return {
        "config": dataclasses.asdict(cfg),
        "layers": layers,
        "parameters": {
            "total": total,
            "active": total - _idle(cfg, components["experts"]),
            "components": components,
        },
        "bytes": {
            "weights_bf16": 2 * total,
            "weights_fp32": 4 * total,
            "adamw_moments_fp32": 8 * total,
            "adamw_training_state": 12 * total,
        },
    }


def _idle(cfg: ModelConfig, routed: int) -> int:
    """Of the routed experts' parameters, those that a token does not visit."""
    return routed // cfg.num_experts * (cfg.num_experts - cfg.experts_per_token)


def _count(cfg: ModelConfig) -> dict[tuple[int | None, str], int]:
    """Parameters by (layer of the pattern, component), of one block; the layer is None outside the blocks."""
    from flax import nnx

    from llama4_jax.text import abstract

    counts: dict[tuple[int | None, str], int] = {}
    for place, weight in nnx.to_flat_state(nnx.state(abstract(cfg), nnx.Param)):
        path: tuple[Any, ...] = tuple(place)
        layer: int | None = None
        size = math.prod(weight.get_value().shape)
        if path[0] == "blocks":  # ("blocks", "layers", i, ...), stacked over blocks
            layer, path, size = path[2], path[3:], size // cfg.num_blocks
        key = (layer, _component(path))
        counts[key] = counts.get(key, 0) + size
    return counts


def _component(path: tuple[Any, ...]) -> str:
    """The component that a weight belongs to, by its path within the model or within a layer."""
    top, below = path[0], path[1]
    if top == "ffn":
        return {"experts": "experts", "shared": "shared", "router_DE": "router", "bias_E": "router"}.get(below, "dense")
    return "norms" if top.endswith("_norm") else top


def _show(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    cfg, parameters = summary["config"], summary["parameters"]
    period = MODELS[summary["name"]]().period
    console = Console(highlight=False)
    console.print(
        f"[bold]{summary['name']}[/bold]: {_short(parameters['total'])} parameters, "
        f"{_short(parameters['active'])} active; {cfg['num_layers']} layers, width {cfg['embed_dim']}, "
        f"{cfg['num_heads']}/{cfg['num_kv_heads']} heads of {cfg['head_dim']},\nvocabulary {cfg['vocab_size']}, "
        f"chunks of {cfg['chunk']}"
    )
    title = "Layers (MoE k/E: a token visits k of E routed experts, and a shared one)"
    table = Table("layers", "attention", "feed-forward", title=title, title_justify="left")
    table.add_column("parameters", justify="right")
    table.add_column("active", justify="right")
    for i, layer in enumerate(summary["layers"][:period]):
        experts = f"MoE {cfg['experts_per_token']}/{layer['experts']}"
        table.add_row(
            _indices([x["index"] for x in summary["layers"][i::period]]), f"{layer['attention']} {layer['positions']}",
            experts if layer["feed_forward"] == "moe" else f"dense {cfg['dense_dim']}",
            f"{layer['parameters']:,}", f"{layer['active_parameters']:,}",
        )  # fmt: skip
    console.print(table)

    table = Table("component", title="Parameters", title_justify="left")
    table.add_column("parameters", justify="right")
    table.add_column("share", justify="right")
    for component, n in parameters["components"].items():
        if n:
            table.add_row(COMPONENTS[component], f"{n:,}", f"{n / parameters['total']:.2%}")
    table.add_section()
    table.add_row("total", f"{parameters['total']:,}", "100.00%", style="bold")
    share = parameters["active"] / parameters["total"]
    table.add_row("active for a token", f"{parameters['active']:,}", f"{share:.2%}")
    console.print(table)

    table = Table("what", title="Memory, before it is split over devices", title_justify="left")
    table.add_column("size", justify="right")
    names = ("weights in bf16", "weights in fp32", "AdamW moments in fp32", "fp32 weights and AdamW moments")
    for name, size in zip(names, summary["bytes"].values(), strict=True):
        table.add_row(name, _size(size))
    console.print(table)


def _indices(indices: list[int]) -> str:
    """0, 4, ..., 44 for the layers that stand alike in every period."""
    if len(indices) > 3:
        return f"{indices[0]}, {indices[1]}, …, {indices[-1]}"
    return ", ".join(map(str, indices))


def _short(n: int) -> str:
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if n >= size:
            return f"{n / size:.2f}{unit}"
    return f"{n:,}"


def _size(n: int) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if n >= size:
            return f"{n / size:,.1f} {unit}"
    return f"{n / 2**10:,.1f} KiB"
