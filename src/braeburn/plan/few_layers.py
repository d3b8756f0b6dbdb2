"""A model of many layers, planned from models of a few: programs in which layers are written out
one by one take seconds to trace, and equal layers do the same.
"""

from dataclasses import replace
from typing import NamedTuple

from braeburn.config import ModelConfig
from braeburn.plan.device_work import DeviceMemory, DeviceWork, Kernel, Product
from braeburn.plan.forward import CollectiveTotal
from braeburn.plan.graph import Amount


class Term(NamedTuple):
    """A model of few layers, and how often what it does counts: less than nothing where it stands
    for what others count too often.
    """

    factor: int
    model: ModelConfig


def terms_of(model: ModelConfig) -> list[Term]:
    """Models of few layers whose sum, each by its factor, does what a model does.

    Of a segment of more than two repeats one and two are traced: the difference is one repeat more.
    """
    pattern, tail = len(model.pattern), len(model.tail_pattern)
    repeats, rest = divmod(model.num_layers - model.tail_layers, pattern)
    tails = model.tail_layers // tail if tail else 0

    def of(first: int, last: int) -> ModelConfig:
        return model.model_copy(
            update={"num_layers": first * pattern + rest + last * tail, "tail_layers": last * tail}
        )

    few = repeats if repeats <= 2 else 1
    few_tails = tails if tails <= 2 else 1
    more, more_tails = repeats - few, tails - few_tails
    found = [Term(1 - more - more_tails, of(few, few_tails))]
    if more:
        found.append(Term(more, of(few + 1, few_tails)))
    if more_tails:
        found.append(Term(more_tails, of(few, few_tails + 1)))
    return found


def sum_of_work(parts: list[tuple[int, DeviceWork]]) -> DeviceWork:
    """What a device does for a model, from what it does for those of `terms_of`, each with its
    factor.
    """
    products: dict[tuple[float, float], int] = {}
    kernels: dict[tuple[Kernel, int], float] = {}
    collectives: dict[tuple[str, str, str], tuple[float, float]] = {}
    element_wise = 0.0
    for factor, work in parts:
        element_wise += factor * work.element_wise
        for product in work.products:
            size = product.flops, product.bytes
            products[size] = products.get(size, 0) + factor * product.times
        for kernel in work.kernels:
            kind = replace(kernel, calls=kernel.calls._replace(once=Amount())), kernel.length
            kernels[kind] = kernels.get(kind, 0.0) + factor * sum(kernel.calls.once)
        for total in work.collectives:
            key = total.axis, total.kind, total.what
            moved, times = collectives.get(key, (0.0, 0.0))
            collectives[key] = moved + factor * total.bytes, times + factor * total.times
    return DeviceWork(
        tuple(Product(*size, times) for size, times in products.items() if times),
        tuple(
            replace(kernel, calls=kernel.calls._replace(once=Amount(0.0, once)))
            for (kernel, _), once in kernels.items()
        ),
        element_wise,
        tuple(
            CollectiveTotal(axis, kind, moved, times, what)
            for (axis, kind, what), (moved, times) in collectives.items()
            if times
        ),
    )


def sum_of_memory(parts: list[tuple[int, DeviceMemory]]) -> DeviceMemory:
    """What a device holds for a model, from what it holds for those of `terms_of`, each with its
    factor.
    """

    def total(name: str) -> float:
        return sum(factor * getattr(memory, name) for factor, memory in parts)

    held: dict[str, float] = {}
    for factor, memory in parts:
        for name, size in memory.held.items():
            held[name] = held.get(name, 0.0) + factor * size
    return DeviceMemory(
        total("weights"),
        held,
        total("arguments"),
        total("results"),
        total("workspace"),
        total("relaid"),
    )
