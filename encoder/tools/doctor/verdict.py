"""What the ranks of a doctor found out, compared: mistakes that no other node would mend, and nodes to exclude.

What most nodes have in common is right: a node that differs, or cannot see what the others see, is a bad one. What half
of the nodes or more have wrong is a mistake in the input.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from encoder.base.units import counted, short_bytes
from encoder.tools.plan.memory import Needs

SLOW_SHARE = 0.25  # of the fastest pair: below, a pair of nodes is slow
SHOWN_VERSIONS = (
    "python",
    "torch",
    "deepspeed",
    "transformers",
    "mosaicml-streaming",
    "sources",
)
LEAST_GB_PER_SECOND = 0.01  # no training goes on over less, whatever the others have


@dataclass(kw_only=True)
class Findings:
    """What is wrong. `nodes` are to be left out, with the reason; a mistake is not mended by other nodes."""

    mistakes: list[str] = field(default_factory=list)
    nodes: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    rows: list[tuple[str, str]] = field(default_factory=list)  # of the table for people

    @property
    def exit_code(self) -> int:
        """0 fine, 2 a mistake, 4 bad nodes."""
        if self.mistakes:
            return 2
        if self.nodes:
            return 4
        return 0

    def exit_code_of(self, nodes: Collection[str]) -> int:
        """The same of a job that has these nodes: 5 where no other is left."""
        if self.exit_code == 4 and set(nodes) <= set(self.nodes):
            return 5
        return self.exit_code

    def exclude(self, node: str, why: str) -> None:
        """A node to leave out; the first reason stays."""
        self.nodes.setdefault(node, why)

    def exclude_or_mistake(self, wrong: Mapping[str, str], *, of: int) -> None:
        """`wrong` says of some of the `of` nodes what is wrong with them: nodes to leave out, or a mistake."""
        # fewer than half: those nodes are at fault; else it is what all of them read
        if 2 * len(wrong) < of:
            for node, why in wrong.items():
                self.exclude(node, why)
        elif wrong:
            node, why = next(iter(wrong.items()))
            self.mistakes.append(f"{why}{_place(wrong, of=of)}")

    def check_equal(self, what: str, by_node: Mapping[str, Any], *, advice: str) -> bool:
        """All nodes must have the same value of something; says which have another."""
        texts = {node: json.dumps(value, sort_keys=True) for node, value in by_node.items()}
        # the value of most nodes is taken for the right one
        common = Counter(texts.values()).most_common(1)[0][0]
        here = next(node for node, text in texts.items() if text == common)
        wrong = {
            node: (
                f"{what} of {node} differ from those of {here}:"
                f" {_difference(by_node[node], by_node[here])}. {advice}"
            )
            for node, text in texts.items()
            if text != common
        }
        self.exclude_or_mistake(wrong, of=len(by_node))
        return not wrong


def judge_facts(
    findings: Findings,
    facts: Mapping[int, Mapping[str, Any]],
    expected: Sequence[str],
    *,
    came: Collection[int],
    needs: Needs,
) -> None:
    """`facts` by rank, `expected` the node of each rank as it was started; ranks that are not among `came` are silent."""
    # backwards, so that the lowest silent rank of a node stays
    silent = {expected[rank]: rank for rank in reversed(range(len(expected))) if rank not in came}
    for node, rank in silent.items():
        findings.exclude(
            node,
            f"rank {rank} of {node} did not come: the node is dead, cut off, or could not start"
            " python",
        )

    firsts = {fact["node"]: fact for fact in facts.values() if fact["local_rank"] == 0}
    if not firsts:
        return
    if 0 in facts:
        fact = facts[0]
    else:
        fact = next(iter(firsts.values()))
    same = findings.check_equal(
        "versions",
        _by_node(facts, "versions"),
        advice="Needed: the same environment and sources. Put both on a disk that all nodes share.",
    )
    if same:
        shown = [f"{name} {v}" for name, v in fact["versions"].items() if name in SHOWN_VERSIONS]
        findings.rows.append(("versions", ", ".join(shown)))
    if findings.check_equal(
        "settings",
        _by_node(facts, "run_sha256"),
        advice="Needed: one run file, on a disk that all nodes share, and the same overrides.",
    ):
        findings.rows.append(("run file", f"the same on {counted(len(facts), 'rank')}"))
    _judge_shards(findings, firsts)
    _judge_devices(findings, facts)
    _judge_memory(findings, firsts, facts, needs)


def _judge_shards(findings: Findings, firsts: Mapping[str, Mapping[str, Any]]) -> None:
    before = len(findings.mistakes), len(findings.nodes)
    paths = list(next(iter(firsts.values()))["shards"])
    for path in paths:
        other = {"error": f"{path} is in the run file of other nodes alone."}
        at = {node: fact["shards"].get(path, other) for node, fact in firsts.items()}
        findings.exclude_or_mistake(
            {
                node: f"{a['error']} Looked for from the folder {firsts[node]['folder']}"
                for node, a in at.items()
                if "error" in a
            },
            of=len(firsts),
        )
        cards = {node: a["card"] for node, a in at.items() if "card" in a}
        if cards:
            findings.check_equal(
                f"the cards of {path}", cards, advice="Needed: the same shards. Copy them again."
            )
    if before == (len(findings.mistakes), len(findings.nodes)):
        findings.rows.append(
            (
                "shards",
                f"{counted(len(paths), 'folder')} read, cards equal on {counted(len(firsts), 'node')}",
            )
        )


def _judge_devices(findings: Findings, facts: Mapping[int, Mapping[str, Any]]) -> None:
    kinds = Counter(
        fact["device"]["kind"] for fact in facts.values() if "error" not in fact["device"]
    )
    common = kinds.most_common(1)[0][0] if kinds else ""
    short: dict[str, str] = {}
    broken: dict[str, str] = {}
    for rank, fact in facts.items():
        device, node = fact["device"], fact["node"]

        # GPUs that SLURM gave the node, as its first rank saw them
        allotted = next(
            (
                f["gpus_allotted"]
                for f in facts.values()
                if f["node"] == node and f["local_rank"] == 0
            ),
            "",
        )
        was_given = allotted.isdigit() and int(allotted) >= fact["local_size"]
        if "error" in device and device["seen"] < fact["local_size"] and not was_given:
            # the run file and the allocation do not fit each other
            short[node] = device["error"]
        elif "error" in device:
            broken.setdefault(node, f"rank {rank} of {node}: {device['error']}")
        elif device["kind"] != common:
            findings.exclude(
                node,
                f"rank {rank} of {node} has device {device['kind']}, most have {common}: its GPU is"
                " not there",
            )
        elif device.get("memory_errors"):
            findings.exclude(node, f"{node}: {device['memory_errors']}")
    nodes = {fact["node"] for fact in facts.values()}
    # a torch without CUDA, say: other nodes have it, too
    if len(nodes) > 1 and len(broken) == len(nodes):
        findings.mistakes.append(
            f"{next(iter(broken.values())).rstrip('.')} (and so on every node)"
        )
    else:
        for node, why in broken.items():
            findings.exclude(node, why)
    if short:
        findings.mistakes.append(next(iter(short.values())))
    if common and not short and all("error" not in fact["device"] for fact in facts.values()):
        names = Counter(
            fact["device"].get("name", fact["device"]["kind"]) for fact in facts.values()
        )
        devices = ", ".join(f"{n} x {name}" for name, n in names.items())
        findings.rows.append(("devices", f"{devices}, products right"))
        if common == "cpu":
            findings.warnings.append(
                "no GPU here: the run would compute on the CPU. tessera plan RUN.yaml --measure"
                " says how long it takes."
            )


def _judge_memory(
    findings: Findings,
    firsts: Mapping[str, Mapping[str, Any]],
    facts: Mapping[int, Mapping[str, Any]],
    needs: Needs,
) -> None:
    memory = needs.memory
    sure = memory.total - memory.activations  # these are counted, activations estimated
    on_gpu = any(fact["device"]["kind"] == "cuda" for fact in facts.values())
    wrong: dict[str, str] = {}
    least = 0
    for fact in facts.values():
        node, device, local = fact["node"], fact["device"], fact["local_size"]
        machine = firsts.get(node, {}).get("memory", {"free": 0, "allowed": 0})
        if on_gpu and "free" in device:
            # a GPU for each rank; on CPUs the ranks of a node share its memory
            have, need, all_need = device["free"], sure, memory.total
        else:
            have = min(v for v in (machine["free"], machine["allowed"] or machine["free"]))
            need, all_need = local * sure, local * memory.total
        if not have:
            continue

        least = min(least or have, have)
        for_ranks = "" if on_gpu else f" for {counted(local, 'rank')}"
        if have < need:
            wrong[node] = (
                f"{node} has {short_bytes(have)} of memory free{for_ranks}; needed:"
                f" {short_bytes(need)} for weights, gradients and optimizer alone. Use more ranks,"
                " a higher engine.zero_stage, or end what else runs there"
            )
        elif have < all_need:
            findings.warnings.append(
                f"{node} has {short_bytes(have)} of memory free, the run needs about"
                f" {short_bytes(all_need)}. If it runs out: a smaller loader.micro_batch_rows, or"
                " engine.activation_checkpointing: blocks."
            )
    findings.exclude_or_mistake(wrong, of=len(firsts))
    if not wrong and least:
        where = "on a GPU" if on_gpu else "on a node"
        text = f"a rank needs about {short_bytes(memory.total)}; least free {where}"
        findings.rows.append(("memory", f"{text} {short_bytes(least)}"))


def judge_folder(
    findings: Findings,
    shared: Mapping[str, Mapping[str, Any]],
    missing: Sequence[str],
    out: str,
    *,
    checkpoint_bytes: int,
    at_most: int = 2,
) -> None:
    """`at_most`: how many more checkpoints than now will ever stand at once.
    `shared`: by node, whether it saw rank zero's file in the run folder, whether it could write there, and the room.
    `missing`: nodes whose file rank zero did not see."""
    wrong: dict[str, str] = {}
    # a new checkpoint is written before an old one goes
    need = 2 * checkpoint_bytes
    for node, at in shared.items():
        if not at["seen"]:
            wrong[node] = (
                f"{node} does not see what rank 0 writes into the run folder {out} ({at['place']}"
                " there). Needed: a folder that all nodes share. Set another out"
            )
        elif at.get("error"):
            wrong[node] = (
                f"{node} cannot write into the run folder {out}: {at['error']}. Needed: a folder"
                " that can be written"
            )
        elif node in missing:
            wrong[node] = (
                f"rank 0 does not see what {node} writes into the run folder {out}. Needed: a"
                " folder that all nodes share"
            )
        elif at["free"] < need:
            wrong[node] = (
                f"the disk of {out} has {short_bytes(at['free'])} free; needed:"
                f" {short_bytes(need)}, two checkpoints of {short_bytes(checkpoint_bytes)}. Make"
                " room, or set another out"
            )
    findings.exclude_or_mistake(wrong, of=len(shared))
    if not wrong:
        free = min(at["free"] for at in shared.values())
        whole = at_most * checkpoint_bytes
        later = ""
        if free < whole:
            later = f", the {at_most} still to stand at once {short_bytes(whole)}: NOT enough to the end"
        findings.rows.append(
            (
                "run folder",
                (
                    f"{out}: seen and written by {counted(len(shared), 'node')}, {short_bytes(free)}"
                    f" free; two checkpoints take {short_bytes(need)}{later}"
                ),
            )
        )


def judge_links(
    findings: Findings, found: Mapping[int, Sequence[Mapping[str, Any]]], nodes: Sequence[str]
) -> None:
    """Excludes a node all of whose pairs fail or are far slower than the fastest pair; a bad pair of good nodes is a warning.

    Slow is a node by two measured links: where a neighbour fails and one link is left, that is a warning, too.

    found: by rank, what it measured of its pairs: {"nodes", "gb_per_second"} or {"nodes", "error"}
    nodes: of each rank
    """
    silent = {node for rank, node in enumerate(nodes) if rank not in found}
    for node in sorted(silent):
        findings.exclude(node, f"{node} fell silent while links were measured")
    speeds: dict[tuple[str, ...], float] = {}
    errors: dict[tuple[str, ...], str] = {}
    for view in chain.from_iterable(found.values()):
        pair = tuple(view["nodes"])
        if silent & set(pair):
            continue
        if "error" in view:
            errors.setdefault(pair, view["error"])
        else:
            # the slower of the two views of a pair
            speeds[pair] = min(view["gb_per_second"], speeds.get(pair, view["gb_per_second"]))

    # pairs that some rank saw fail do not set the mark
    fastest = max((speed for pair, speed in speeds.items() if pair not in errors), default=0.0)
    slow = {
        pair: f"{speed:.3g} GB/s, where the fastest pair has {fastest:.3g}"
        for pair, speed in speeds.items()
        if speed < max(LEAST_GB_PER_SECOND, SLOW_SHARE * fastest)
    }
    bad = slow | errors
    pairs = list(speeds | errors)
    pairs_of: dict[str, list[tuple[str, ...]]] = {}
    for node in nodes:
        pairs_of[node] = [pair for pair in pairs if node in pair]
    failing = {node for node, own in pairs_of.items() if own and errors.keys() >= set(own)}
    # a link that is slow once may have met a busy moment: beside a node that fails, only one is left to judge by
    enough = 2 if len(pairs_of) > 2 else 1
    for node, own in pairs_of.items():
        telling = [pair for pair in own if node in failing or not failing & set(pair)]
        slow_with_all = len(telling) >= enough and all(pair in bad for pair in telling)
        # one bad pair may be the other's fault; all pairs bad is the node's own
        if node in failing or slow_with_all:
            other = next(name for name in telling[0] if name != node)
            more = "; cannot tell which of the two is at fault" if len(pairs) == 1 else ""
            findings.exclude(node, f"{node} with {other}: {bad[telling[0]]}{more}")
    for pair, why in bad.items():
        if set(pair) & set(findings.nodes):
            continue
        well_linked = [node for node in pair if set(pairs_of[node]) - bad.keys() - {pair}]
        if len(well_linked) == len(pair):
            elsewhere = "though both are well linked to their other neighbours"
        else:
            elsewhere = "measured once, since a neighbour fails: ask again without it"
        findings.warnings.append(f"{pair[0]} with {pair[1]}: {why}, {elsewhere}.")
    if speeds and not bad:
        findings.rows.append(
            (
                "links",
                f"{counted(len(speeds), 'pair')} of nodes, {_span([*speeds.values()])} GB/s (bus)",
            )
        )


def judge_all_reduce(
    findings: Findings, found: Mapping[int, Mapping[str, Any]], nodes: Sequence[str]
) -> None:
    """The sum over all ranks: exact on each, and how fast it was."""
    silent = {
        node: f"{node} fell silent in the all-reduce"
        for rank, node in enumerate(nodes)
        if rank not in found
    }
    wrong = {
        nodes[rank]: f"rank {rank} of {nodes[rank]}: {value['error']}"
        for rank, value in found.items()
        if "error" in value
    }

    # all nodes wrong at once, though each pair was fine: no node is to blame
    several = len(set(nodes)) > 1
    if not silent and several and len(wrong) == len(set(nodes)):
        findings.mistakes.append(
            "the all-reduce of all ranks fails on every node though no node fails with its"
            f" neighbours: {next(iter(wrong.values()))}. Look at the network's settings"
            " (NCCL_DEBUG=INFO, GLOO_SOCKET_IFNAME)"
        )
        return
    # where ranks fell silent, the errors of the others follow from that
    for node, why in (silent or wrong).items():
        findings.exclude(node, why)
    if not silent and not wrong:
        slowest = min(value["gb_per_second"] for value in found.values())
        findings.rows.append(
            ("all-reduce", f"exact, {slowest:.3g} GB/s (bus) over {counted(len(nodes), 'rank')}")
        )


def _by_node(facts: Mapping[int, Mapping[str, Any]], key: str) -> dict[str, Any]:
    """One value a node: that of its first rank, or of the rank that differs from it."""
    found: dict[str, Any] = {}
    for fact in facts.values():
        found.setdefault(fact["node"], fact[key])
        # unlike any other node's value, so that the node is found out
        if fact[key] != found[fact["node"]]:
            found[fact["node"]] = {"two on one node": [found[fact["node"]], fact[key]]}
    return found


def _place(wrong: Collection[str], *, of: int) -> str:
    """Where something is wrong, of so many nodes."""
    if of == 1:
        return ""
    if len(wrong) == of:
        return " (on every node)"
    return f" (on {', '.join(wrong)})"


def _difference(here: Any, there: Any) -> str:
    if isinstance(here, dict) and isinstance(there, dict):
        key = next(k for k in {**here, **there} if here.get(k) != there.get(k))
        return f"{key} {here.get(key, 'is not there')} where others have {there.get(key, 'none')}"
    return f"{str(here)[:12]} where others have {str(there)[:12]}"


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    if len(values) == 1:
        return f"{low:.3g}"
    return f"{low:.3g} to {high:.3g}"
