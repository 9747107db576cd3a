"""`llama4 generate MODEL`: continue prompts, or answer them, with a run's weights or a Hugging Face folder's."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from data.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="RUN, RUN@STEP, or a folder in Hugging Face's format")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help='JSON lines, each a text or {"prompt": ...}; - is stdin')
    parser.add_argument("--chat", action="store_true", help="a prompt is what a user says (Llama 4's tokenizer)")
    parser.add_argument("--learner", help="which model, where the run has several")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default: 128")
    parser.add_argument("--temperature", type=float, default=0.6, help="0: always the likeliest (default: 0.6)")
    parser.add_argument("--top-p", type=float, default=0.9, help="default: 0.9")
    parser.add_argument("--seed", type=int, default=0, help="the same seed, the same texts (default: 0)")
    parser.add_argument("--stop", type=int, action="append", metavar="ID", help="ids that end a text (default: those "
                        "the folder names, else the tokenizer's end of text)")  # fmt: skip
    parser.add_argument("--batch", type=int, default=8, help="prompts at once (default: 8)")
    parser.add_argument("--prefill", type=int, metavar="TOKENS", help="of a prompt are read at once (default: 8192)")
    parser.add_argument("--mesh.context", dest="context", type=int, default=1, metavar="DEVICES", help="over which the "
                        "global layers' caches, and the weights, are spread (default: 1)")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    parser.add_argument("--json", action="store_true", help='print {"prompt", "text", "tokens"} a line')


def run(args: argparse.Namespace) -> int:
    prompts = _prompts(args)
    if args.batch < 1:
        raise ValueError(f"--batch must be at least 1, not {args.batch}")
    import jax

    from llama4_jax.axes import Execution
    from llama4_jax.generate import generate
    from training.load import load_model

    mesh = _mesh(args.context)
    model, tokenizer, stops = load_model(args.model, args.learner, mesh)
    stops = tuple(args.stop) if args.stop else stops
    ids = [_encode(tokenizer, prompt, args.chat) for prompt in prompts]
    for first in range(0, len(ids), args.batch):
        some = ids[first : first + args.batch]
        new = generate(
            model, some, args.max_new_tokens, temperature=args.temperature, top_p=args.top_p,
            key=jax.random.fold_in(jax.random.key(args.seed), first // args.batch), eos_ids=stops,
            piece=args.prefill, mesh=mesh, execution=Execution(compute_dtype=args.dtype),
        )  # fmt: skip
        for prompt, tokens in zip(prompts[first:], new, strict=False):
            text = tokenizer.decode(tokens)
            if args.json:
                print(json.dumps(dict(prompt=prompt, text=text, tokens=tokens)), flush=True)
            else:
                _show(prompt, text, args.chat)
    return 0


def _mesh(context: int) -> Mesh | None:
    """So many devices along `context`; None for one."""
    import jax

    from training.config import MeshConfig
    from training.mesh import make_mesh

    devices = jax.devices()
    if not 1 <= context <= len(devices):
        raise ValueError(f"--mesh.context must be from 1 to the {len(devices)} devices there are, not {context}")
    return make_mesh(MeshConfig(fsdp=1, context=context), devices[:context]) if context > 1 else None


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt)
    if args.prompts:
        if args.prompts != "-" and not Path(args.prompts).exists():
            raise FileNotFoundError(f"--prompts {args.prompts} does not exist")
        lines = sys.stdin if args.prompts == "-" else Path(args.prompts).read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                value = json.loads(line) if line.strip() else None
            except ValueError:
                line = f'{args.prompts}:{number} is not JSON: a text in quotes, or {{"prompt": ...}}'
                raise ValueError(line) from None
            value = value.get("prompt") if isinstance(value, dict) else value
            if line.strip() and not isinstance(value, str):
                raise ValueError(f'{args.prompts}:{number} holds no text, nor an object with a text as its "prompt"')
            prompts += [value] if isinstance(value, str) else []
    if not prompts:
        raise ValueError("a prompt is needed: --prompt TEXT, or --prompts FILE")
    return prompts


def _encode(tokenizer: Tokenizer, prompt: str, chat: bool) -> list[int]:
    from data.llama4_tokenizer import Llama4Tokenizer

    if not chat:
        return [tokenizer.bos_id, *tokenizer.encode(prompt)]
    if not isinstance(tokenizer, Llama4Tokenizer):
        raise ValueError("--chat needs Llama 4's tokenizer, which alone has the messages' marks; leave it out")
    return tokenizer.render_chat([dict(role="user", content=prompt)], reply=True).tolist()


def _show(prompt: str, text: str, chat: bool) -> None:
    from data.contents import printable

    print(f"> {printable(prompt)}\n{printable(text)}\n" if chat else f"{printable(prompt)}{printable(text)}\n---")
