"""A plan as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from contrastive.plan import costs
from contrastive.plan.cards import GIB, HERE

if TYPE_CHECKING:
    from contrastive.plan.recipe import Plan


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan's numbers: bytes, FLOPs, seconds; the card as in its table."""
    network, step = plan.job.network, plan.step
    return {
        "recipe": plan.recipe,
        "card": asdict(plan.card),
        "devices": plan.job.world,
        "precision": plan.precision,
        "assumptions": asdict(plan.assumed),
        "notes": list(plan.notes),
        "parameters": {tower.name: {"all": tower.parameters, "learned": tower.learned} for tower in network.towers}
        | {"further": network.further, "all": network.parameters, "learned": network.learned},
        "flops_a_sample": {"forward": plan.forward, "forward_and_backward": plan.both}
        | {"step": step.tower_flops / plan.job.rows},
        "memory": plan.memory | {"total": sum(plan.memory.values()), "card": plan.card.memory * GIB},
        "fits": plan.fits,
        "remedies": remedies(plan),
        "traffic": {"gradients": step.gradient_traffic, "loss": step.loss_traffic},
        "seconds": step.seconds | {"step": step.total, "once": plan.once, "run": plan.seconds},
        "bound": step.bound,
        "steps": plan.steps,
        "samples_a_second": plan.job.rows * plan.job.world / step.total,
        "device_hours": plan.seconds * plan.job.world / 3600,
        "cost": None if plan.price is None else plan.price * plan.seconds * plan.job.world / 3600,
    }


def remedies(plan: Plan) -> list[str]:
    """What makes a plan fit that does not, each with its value."""
    if plan.fits:
        return []
    job, reserve, capacity = plan.job, plan.assumed.reserve, plan.card.memory * GIB
    found = []
    if plan.chunkable and (chunk := costs.largest_chunk(job, reserve, capacity)):
        found.append(f"train.chunk={chunk} (the same gradient, one more forward)")
    if not plan.checkpointing:
        found.append("train.gradient_checkpointing=true (one more forward); plan again with it")
    if devices := costs.fewest_devices(job, reserve, capacity):
        found.append(f"--gpus {devices}")
    return found or ["a card with more memory, a smaller model, or a smaller train.global_batch"]


def lines(plan: Plan) -> list[str]:
    """The plan for the screen."""
    job, card, step, assumed = plan.job, plan.card, plan.step, plan.assumed
    network, batch = job.network, job.rows * job.world
    what = "this machine" if card.name == HERE else card.name
    chunks = f", chunks of {job.chunk}" if job.chunk and job.chunk < job.rows else ""
    out = [
        f"plan of {plan.recipe} on {job.world} x {what}: {plan.precision}, global batch {batch:,} = {job.world} x "
        f"{job.rows:,}{chunks}{', gradient checkpointing' if plan.checkpointing else ''}",
        "",
        "parameters",
    ]
    for tower in network.towers:
        out.append(f"  {tower.name + ' tower':28}{tower.parameters:>16,}   learned {tower.learned:>14,}")
    out += [f"  {'all':28}{network.parameters:>16,}   learned {network.learned:>14,}", "", "FLOPs a sample"]
    passed = step.tower_flops / job.rows
    out += [
        f"  {'forward':28}{plan.forward / 1e9:>16,.3f} G",
        f"  {'forward and backward':28}{plan.both / 1e9:>16,.3f} G",
    ]
    if passed > plan.both * 1.001:
        out.append(f"  {'with the chunks':28}{passed / 1e9:>16,.3f} G")
    total = sum(plan.memory.values())
    out += ["", "memory of a card, GiB"]
    out += [f"  {part:28}{size / GIB:>16,.2f}" for part, size in plan.memory.items()]
    out += [f"  {'together':28}{total / GIB:>16,.2f}   of {card.memory:,.0f}"]
    if plan.fits:
        out.append(f"  => fits: {total / GIB:,.1f} of {card.memory:,.0f} GiB")
    else:
        out.append(f"  => DOES NOT FIT: {total / GIB:,.1f} of {card.memory:,.0f} GiB. Use one of:")
        out += [f"       {remedy}" for remedy in remedies(plan)]
    out += ["", "a step, milliseconds"]
    out += [f"  {part:28}{1e3 * seconds:>16,.3f}" for part, seconds in step.seconds.items()]
    out += [f"  {'together':28}{1e3 * step.total:>16,.3f}   bound by: {step.bound}"]
    out += ["", "received by a card in a step, MB"]
    out += [
        f"  {'gradients, all-reduce':28}{step.gradient_traffic / 1e6:>16,.3f}",
        f"  {'loss, exchange':28}{step.loss_traffic / 1e6:>16,.3f}",
    ]
    rate = batch / step.total
    hours = plan.seconds / 3600
    out += [
        "",
        "the run",
        f"  {'steps':28}{plan.steps:>16,}   {plan.steps * batch:,} samples",
        f"  {'samples a second':28}{rate:>16,.0f}   {rate / job.world:,.0f} a card: see that the loader gives that",
        f"  {'hours':28}{hours:>16,.2f}   {hours * job.world:,.1f} card hours; evaluation and saving left out",
    ]
    if plan.once:
        out.append(f"  {'of them before step 1':28}{plan.once / 3600:>16,.2f}")
    if plan.price is not None:
        out.append(f"  {'cost':28}{plan.price * hours * job.world:>16,.2f}   at {plan.price:g} a card hour")
    peak = card.peak[plan.precision]
    source = "measured" if card.name == HERE else "data sheet, dense"
    out += [
        "",
        "assumed",
        f"  peak {peak:,.4g} TFLOP/s in {plan.precision}, {card.peak['fp32']:,.4g} in fp32 (the loss); memory "
        f"{card.bandwidth:,.0f} GB/s ({source})",
        f"  of that, products reach {assumed.utilisation:g} (--utilisation), other operations "
        f"{assumed.memory_utilisation:g} (--memory-utilisation); nothing overlaps",
    ]
    if job.world > 1:
        out += [
            f"  {assumed.per_node} cards a machine (--per-node); links of {assumed.link:g} GB/s inside (--link), "
            f"{assumed.network:g} GB/s a card between machines (--network), one direction; "
            f"{assumed.link_utilisation:g} of that is reached (--link-utilisation)",
            f"  the all-reduce hides behind {assumed.overlap:g} of the last backward (--overlap); no latencies",
        ]
    out.append(f"  {assumed.reserve:g} GiB for the context, libraries and fragmentation (--reserve)")
    out += [f"  {note}" for note in plan.notes]
    return out
