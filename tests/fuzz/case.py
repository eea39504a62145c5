"""One drawn program and what happens to its cache: names of rows of the grammar, which JSON can hold."""

from __future__ import annotations

import dataclasses
import json
from random import Random

from fuzz import appends, attention, weights
from fuzz.holders import GROWING, HOLDERS, STACKS

LENGTH = 48  # tokens that a buffer has room for
FORK = 100  # an event


@dataclasses.dataclass(frozen=True)
class Case:
    """Choices of each part of the grammar; see the files that they are rows of."""

    layers: int
    heads: int
    kv_heads: int
    dim: int
    batch: int
    dtype: str
    holder: str
    layout: str
    position: str
    append: str
    read: str
    mask: str
    repeat: str
    attention: str
    """A row of ``SDPA``, or "written out", made of"""
    product: str
    before: str
    applied: str
    after: str
    weights: str
    output: str
    in_place: str
    """What is changed in place: ``IN_PLACE``."""
    graph_break: str
    """"", or between which parts of a layer there is one."""
    bits: int
    """16, or what is stored."""
    scheme: str
    dynamic: bool
    """Whether Dynamo may make sizes symbols."""
    eager_prompt: bool
    """Whether the first step runs uncompiled."""
    rotating: int
    """Tokens after which positions begin anew, 0: never."""
    events: tuple[int, ...]
    """The prompt and what follows it: new tokens of a step; negative numbers take tokens back, 0 empties the cache,
    ``FORK`` goes on with a copy, and back to what was copied at the next one. Of a ragged batch one row is taken back
    or begins anew."""
    ragged: bool = False
    """Whether each row is written at positions of its own."""
    products: str = "linear"
    """The layers' products with weights: ``PRODUCTS`` of ``weights.py``."""
    differs: str = ""
    """What is a constant of its own in layer ``odd``: ``DIFFERS`` of ``weights.py``."""
    odd: int = -1
    """The layer that differs, -1: none."""
    all_dynamic: bool = False
    """Whether all sizes are symbols from the first compilation on, those of the cache, too (``dynamic=True``)."""

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        """What :meth:`to_json` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "events": tuple(fields["events"])})


IN_PLACE = {
    "": ("", ""),
    "new keys": ("k.mul_(1.5)", ""),
    "query": ("", "q.add_(1.0)"),
    "mask": ("", "seen.logical_not_()\nseen.logical_not_()"),
    "cache read": ("", "K_.mul_(1.0)"),
}


#: What numbers stand for: rows that came later are drawn by ``_stored``.
EARLIER_HOLDERS = [name for name in HOLDERS if name not in STACKS or name == "stacked"]
EARLIER_LAYOUTS = ("bhtd", "bthd", "rank 3")


def draw(number: int) -> Case:
    """The program of the grammar that ``number`` stands for; eager code can run it.

    Each is drawn by itself: hypothesis makes new examples of earlier ones, so that many cases would test the same.
    """
    random = Random(number)
    pick = lambda options: random.choice(list(options))  # noqa: E731
    mostly = lambda usual, options: usual if random.randrange(5) else pick(options)  # noqa: E731
    grows = random.randrange(5) == 0
    position = pick(appends.POSITIONS)
    has_int = position in appends.HAVE_INT
    forms = [f for f in appends.APPENDS if has_int or f not in appends.NEEDS_INT]
    reads = [r for r in attention.READS if (has_int and not grows) or r not in attention.READS_NEED_INT]
    kv_heads, rotating = pick((1, 2, 2)), 0 if grows or random.randrange(10) else pick((8, 16))
    case = Case(
        layers=pick((1, 1, 2, 2)), heads=kv_heads * pick((1, 2, 2)), kv_heads=kv_heads, dim=pick((8, 16)),
        batch=pick((1, 1, 2)), dtype=mostly("float32", ("float32", "bfloat16", "float16", "float64")),
        holder=pick(GROWING) if grows else mostly("list of tuples", EARLIER_HOLDERS),
        layout="bhtd" if grows else mostly("bhtd", EARLIER_LAYOUTS),
        position=position, append="cat" if grows else mostly("indexed", forms), read=mostly("whole", reads),
        mask="none" if rotating else mostly("causal", attention.MASKS), repeat=pick(attention.REPEATS),
        attention=pick(("written out", "written out", *attention.SDPA)),
        product=pick(attention.PRODUCTS), before=pick(attention.BEFORE), applied=pick(attention.APPLIED),
        after=mostly("nothing", attention.AFTER), weights=mostly("softmax", attention.WEIGHTS),
        output=pick(attention.OUTPUTS), in_place=mostly("", IN_PLACE),
        graph_break=mostly("", ("", "between layers", "before attention")),
        bits=pick((16, 8, 4, 4, 2)), scheme=pick(("kivi", "ranked", "shared")),
        dynamic=random.randrange(4) == 0, eager_prompt=random.random() < 0.5,
        rotating=rotating, events=_events(random, grows or bool(rotating)),
    )  # fmt: skip
    return _more(case, random)


def _more(case: Case, random: Random) -> Case:
    """What the grammar learnt later, drawn behind all else: what a number stood for before is a part of what it is."""
    layers = random.choice((3, 6, 6, 7)) if random.randrange(8) == 0 else case.layers
    differs = random.choice(list(weights.DIFFERS)) if layers > 1 and not case.rotating else ""
    case = dataclasses.replace(
        case, layers=layers, differs=differs, odd=random.randrange(-1, layers) if differs else -1,
        products=random.choice(("linear", *weights.PRODUCTS)),
    )  # fmt: skip
    if random.randrange(4) == 0 and not case.rotating and case.append != "cat":
        reads = [form for form in attention.READS if form not in attention.READS_NEED_INT]
        case = dataclasses.replace(
            case, ragged=True, batch=random.choice((2, 3)), layout="bhtd", append=random.choice(list(appends.RAGGED)),
            position="tensor", read=case.read if case.read in reads else "whole",
            mask=case.mask if case.mask in attention.RAGGED_MASKS else "causal", events=_ragged_events(random),
        )  # fmt: skip
    if random.randrange(4) == 0 and not case.rotating:
        at = random.randint(2, max(2, len(case.events) - 1))
        ahead = random.choice((1, 1, 2, 9))
        case = dataclasses.replace(case, events=(*case.events[:at], FORK, ahead, 1, FORK, *case.events[at:]))
    case = dataclasses.replace(case, events=case.events[:5]) if layers > 2 else case  # which take time
    return _stored(case, random)


def _stored(case: Case, random: Random) -> Case:
    """Other orders of dimensions, and several tensors in one; drawn behind all else, as ``_more`` is."""
    grows = case.append == "cat"
    if random.randrange(4) == 0 and not case.ragged:
        case = dataclasses.replace(case, layout=random.choice(list(appends.GROWN if grows else appends.LAYOUTS)))
    if random.randrange(8) == 0:
        case = dataclasses.replace(case, all_dynamic=True, dynamic=True)
    if random.randrange(4) or grows:
        return case
    case = dataclasses.replace(case, holder=random.choice(STACKS))
    if HOLDERS[case.holder].both and not case.ragged and random.randrange(2):
        case = dataclasses.replace(case, append=random.choice(list(appends.TOGETHER)))
    return case


def _ragged_events(random: Random) -> tuple[int, ...]:
    """The longest row's prompt, and steps; one rollback and some rows that begin anew. No row is ever full."""
    chosen = [random.randint(4, 14)]
    other = random.choice((2, 3, 7, 9))
    backs = [-random.randint(1, 3)]
    for _ in range(random.randint(3, 8)):
        kind = random.randrange(8)
        if kind == 0:
            chosen.append(0)
        elif kind == 1 and backs and len(chosen) > 1:
            chosen.append(backs.pop())
        elif sum(chosen) + other < LENGTH - 12:
            chosen.append(random.choice((1, 1, 1, other)))
    return (*chosen, 1)


def _events(random: Random, only_steps: bool) -> tuple[int, ...]:
    """A prompt, then steps, rollbacks and resets; what is rolled back is at most the 8 latest tokens.

    Steps are of two lengths: each other one is a graph more, which is what takes time.
    """
    chosen = [random.randint(1, 14)]
    held, back, other = chosen[0], 0, random.choice((2, 7, 9, 12))
    for _ in range(random.randint(2, 7)):
        kind = random.randrange(10)
        if kind == 0 and not only_steps:
            chosen.append(0)
            held, back = 0, 0
        elif kind == 1 and held > 3 and not only_steps and not back:
            back = min(random.randint(1, 8), held - 1)
            chosen.append(-back)
            held -= back
        else:
            step = min(random.choice((1, 1, 1, other)), LENGTH - held)
            if step > 0:
                chosen.append(step)
                held, back = held + step, 0
    return tuple(chosen)
