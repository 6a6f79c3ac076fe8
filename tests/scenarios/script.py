"""Readable scripts of what happens, with what the cores answered recorded below each line.

A script is blocks of `command` lines, a line `----`, and the recorded output, as in etcd's
data-driven tests. `REWRITE=1 pytest tests/scenarios/test_scripts.py` records anew; read the diff.

Commands (one a line; `#` starts a comment):
  coordinators NAME…        win NAME TERM          lose NAME         kill NAME
  hold NAME                 (its appends stay on their way until `land NAME`)
  land [NAME]               appends reach the ledger and everybody reads them, until none is left
  land_one NAME             one append of NAME reaches the ledger; NAME stays held
  hang NAME    wake NAME    (reads nothing meanwhile, then all of it)
  node NAME KEY=VALUE…      submit JOB KEY=VALUE…  poison            cancel JOB
  members add NAME | members remove NAME | voters NAME HEARD… (hears these, and they know)
  status NODE JOB/N=PHASE…  result NODE JOB/N OUTCOME
  advance MS                jobs                   explain JOB
"""

from typing import Final

from controlplane.core import events as e
from controlplane.core.coordinator import Coordinator, Role
from controlplane.core.membership import Voters
from dataplane.core.explain import explain
from dataplane.core.state import PoolState
from idl import ledger as d
from idl.control import (
    AssignIntent,
    AttemptStatus,
    AttemptView,
    Intent,
    IntentItem,
    NodeReport,
    RenewIntent,
)
from idl.ids import CoordinatorId, Incarnation, PoolName
from idl.jobs import Retry
from idl.ledger import LedgerEntry
from idl.members import CoordinatorPeer
from idl.records import AddMember, AttemptResult, CancelJob, CommandRecord, RemoveMember
from idl.settings import QueuePolicy
from tests.unit.core_builders import ALL_LIMITS, MIB, TIMING, source, spec

SLICE_MS: Final = 250
NODE_CLOCK_MS: Final = 70_000
"""What clocks of nodes show when the script's shows 0."""


def told(decision: d.Decision) -> str:
    """A decision as a few words."""
    match decision:
        case d.Ingested():
            return f"Ingested {decision.job.id}"
        case d.Assigned():
            gpus = f" gpus={list(decision.gpus)}" if decision.gpus else ""
            return f"Assigned {decision.job}/{decision.attempt} to {decision.node}{gpus}"
        case d.Released():
            detail = f" ({decision.detail})" if decision.detail else ""
            return f"Released {decision.job}/{decision.attempt} {decision.outcome}{detail}"
        case d.Rejected():
            return f"Rejected {decision.job}: {decision.code}"
        case d.ResultRefused():
            return f"ResultRefused {decision.job}/{decision.attempt}: {decision.reason}"
        case d.DeadLettered():
            return f"DeadLettered {decision.job}: {decision.code}: {decision.reason}"
        case d.RetryScheduled():
            return f"RetryScheduled {decision.job}/{decision.attempt} at {decision.not_before_ms}"
        case d.Waiting():
            return f"Waiting {decision.job}: {decision.code}: {decision.message}"
        case d.NodeSeen() | d.NodeLost():
            return f"{type(decision).__name__} {decision.node}"
        case d.Commanded():
            refused = f": refused, {decision.refused}" if decision.refused else ""
            return f"Commanded{refused}"
        case d.DeadLetterStored():
            return f"DeadLetterStored {decision.key}"
        case d.TermStarted():
            return "TermStarted"
        case d.Started() | d.Finished():
            return f"{type(decision).__name__} {decision.job}/{decision.attempt}"
        case d.Cancelled():
            return f"Cancelled {decision.job}"
        case d.MembersChanged():
            names = " ".join(peer.name for peer in decision.members)
            return f"MembersChanged {decision.version}: {names}"
        case d.LeaseAwaited():
            return f"LeaseAwaited {decision.job}/{decision.attempt} until {decision.until_ms}"
        case d.LeadConfirmed():
            return f"LeadConfirmed for {decision.leases} leases"
        case d.Vacated():
            there = ", ".join(f"{job}/{attempt}" for job, attempt in decision.attempts)
            return f"Vacated {decision.node}: {there}"


def told_lease(item: IntentItem) -> str:
    lease = item.lease if isinstance(item, AssignIntent | RenewIntent) else None
    return f" lease {lease.since_ms}+{lease.length_ms}" if lease else ""


def told_intent(intent: Intent) -> str:
    words = [
        f"{type(item).__name__.removesuffix('Intent').lower()} {item.job}/{item.attempt}"
        + (f" gpus={list(item.gpus)}" if isinstance(item, AssignIntent) and item.gpus else "")
        + told_lease(item)
        for item in intent.items
    ]
    return f"intent to {intent.node}, term {intent.term}: {', '.join(words)}"


def peer(name: str) -> CoordinatorPeer:
    return CoordinatorPeer(name=CoordinatorId(name), dds_port=7_410 + 2 * int(name[1:]))


class Stage:
    """Coordinators, a ledger and Kafka's records, moved by the commands of a script."""

    def __init__(self) -> None:
        self.now = 0
        self.cores: dict[str, Coordinator] = {}
        self.ledger: list[LedgerEntry] = []
        self.reader = PoolState()
        self.on_the_way: list[tuple[str, LedgerEntry]] = []
        self.held: set[str] = set()
        self.hung: set[str] = set()
        self.read_to: dict[str, int] = {}
        self.records: dict[str, list[object]] = {"queue.default": [], "results": [], "commands": []}
        self.handed: dict[str, dict[str, int]] = {}
        self.lines: list[str] = []

    def play(self, commands: str) -> str:
        """Runs a block; returns what happened, a line each."""
        self.lines = []
        for line in commands.splitlines():
            words = line.split("#")[0].split()
            if words:
                getattr(self, f"do_{words[0]}")(*words[1:])
        self.reader.check_invariants()
        return "\n".join(self.lines) or "nothing"

    def step(self, name: str, event: e.CoordinatorEvent) -> None:
        for effect in self.cores[name].step(event, self.now):
            match effect:
                case e.Append():
                    self.on_the_way.append((name, effect.entry))
                case e.SendIntent():
                    self.lines.append(f"{name}: {told_intent(effect.intent)}")
                case e.WriteDeadLetter():
                    self.lines.append(f"{name}: write dead letter {effect.letter.key}")
                case e.Leading():
                    self.lines.append(f"{name}: leads term {effect.term}")
                case e.Resign():
                    self.lines.append(f"{name}: resigns, {effect.reason}")
                case e.AdoptMembers():
                    names = " ".join(peer.name for peer in effect.members)
                    self.lines.append(f"{name}: members {names}")
                case e.ShowKafka():
                    self.lines.append(f"{name}: kafka {'stalled' if effect.stalled else 'ok'}")
                case e.OpenIntake():
                    self.handed[name] = {p.topic: p.next_offset for p in effect.positions}
                case e.CloseIntake():
                    self.handed.pop(name, None)
                case _:
                    pass

    def hand_over(self) -> None:
        """Whoever has an open intake reads what is new in Kafka."""
        for name in [name for name in self.handed if name not in self.hung]:
            for topic, records in self.records.items():
                start = self.handed.get(name, {}).get(topic, 0)
                found = tuple(records[start:])
                if not found or name not in self.handed:
                    continue
                self.handed[name][topic] = len(records)
                term = self.cores[name].term
                if topic == "results":
                    self.step(name, e.ResultsRead(term=term, results=found))  # type: ignore[arg-type]
                elif topic == "commands":
                    self.step(name, e.CommandsRead(term=term, commands=found))  # type: ignore[arg-type]
                else:
                    self.step(name, e.SubmissionsRead(term=term, submissions=found))  # type: ignore[arg-type]

    # --- commands -----------------------------------------------------------------------------

    def do_coordinators(self, *names: str) -> None:
        for number, name in enumerate(names, 1):
            self.cores[name] = Coordinator(
                CoordinatorId(name), Incarnation(number), PoolName("main"),
                {"default": QueuePolicy()}, TIMING, tuple(peer(name) for name in names),
            )  # fmt: skip
            self.read_to[name] = 0
            self.read_ledger(name)

    def do_win(self, name: str, term: str) -> None:
        self.step(name, e.RoleWon(term=int(term)))

    def do_lose(self, name: str) -> None:
        self.step(name, e.RoleLost(reason="script"))

    def do_kill(self, name: str) -> None:
        del self.cores[name]
        self.handed.pop(name, None)

    def do_hold(self, name: str) -> None:
        self.held.add(name)

    def do_land(self, name: str = "") -> None:
        self.held.discard(name)
        while True:
            self.hand_over()
            ready = [x for x in self.on_the_way if x[0] not in self.held]
            if not ready:
                return
            self.on_the_way.remove(ready[0])
            self.append(ready[0][1])

    def append(self, entry: LedgerEntry) -> None:
        offset = len(self.ledger)
        self.ledger.append(entry)
        verdict = self.reader.apply(offset, entry)
        void = "" if verdict.valid else f" — VOID, {verdict.detail}"
        self.lines.append(f"ledger {offset}: term {entry.term}.{entry.seq} by {entry.leader}{void}")
        self.lines.extend(f"    {told(decision)}" for decision in entry.decisions)
        for name in list(self.cores):
            self.read_ledger(name)

    def read_ledger(self, name: str) -> None:
        if name in self.hung:
            return
        while self.read_to[name] < len(self.ledger):
            offset = self.read_to[name]
            self.read_to[name] = offset + 1
            self.step(name, e.LedgerRead(offset=offset, entry=self.ledger[offset]))
        assert self.cores[name].state.state_hash() == self.reader.state_hash()

    def do_land_one(self, name: str) -> None:
        self.hand_over()
        first = next(x for x in self.on_the_way if x[0] == name)
        self.on_the_way.remove(first)
        self.append(first[1])

    def do_hang(self, name: str) -> None:
        self.hung.add(name)
        self.held.add(name)

    def do_wake(self, name: str) -> None:
        self.hung.discard(name)
        self.read_ledger(name)

    def do_node(self, name: str, *settings: str) -> None:
        given = {key: int(value) for key, value in (word.split("=") for word in settings)}
        capacity = d.Capacity(
            cpu_millis=given.get("cpu", 2) * 1_000, memory_bytes=given.get("memory", 4_096) * MIB,
            gpus=tuple(range(given.get("gpus", 0))),
        )  # fmt: skip
        report = NodeReport(
            pool="main", node=name, incarnation=given.get("incarnation", 1), capacity=capacity,
            enforces=ALL_LIMITS,
        )  # fmt: skip
        for core in list(self.cores):
            self.step(core, e.NodeReported(report=report))

    def do_submit(self, job: str, *settings: str) -> None:
        given = {key: int(value) for key, value in (word.split("=") for word in settings)}
        given |= {"exclusive": True} if given.pop("exclusive", 0) else {}
        retry = Retry(max_attempts=given.pop("attempts", 3), backoff_ms=1_000)
        offset = len(self.records["queue.default"])
        self.records["queue.default"].append(
            e.Submission(
                source=source(offset), queue="default", spec=spec(job, retry=retry, **given)
            )
        )

    def do_poison(self) -> None:
        offset = len(self.records["queue.default"])
        self.records["queue.default"].append(
            e.Submission(
                source=source(offset), queue="default", key="bad key!", error_code="not-utf8-json",
                error_message="record is not application/json",
            )
        )  # fmt: skip

    def do_cancel(self, job: str) -> None:
        at = source(len(self.records["commands"]), "commands")
        record = CommandRecord(by="ada", command=CancelJob(job=job))
        self.records["commands"].append(e.CommandRead(source=at, record=record))

    def do_members(self, verb: str, name: str) -> None:
        at = source(len(self.records["commands"]), "commands")
        order = AddMember(member=peer(name)) if verb == "add" else RemoveMember(name=name)
        record = CommandRecord(by="ada", command=order)
        self.records["commands"].append(e.CommandRead(source=at, record=record))

    def do_voters(self, name: str, *heard: str) -> None:
        self.step(name, e.VotersHeard(voters=Voters(heard=heard, knowing=heard)))

    def do_status(self, node: str, *views: str) -> None:
        attempts = []
        for view in views:
            key, phase = view.split("=")
            job, attempt = key.split("/")
            attempts.append(AttemptView(job=job, attempt=int(attempt), phase=phase))  # type: ignore[arg-type]
        status = AttemptStatus(
            pool="main", node=node, incarnation=self.reader.nodes[node].incarnation, term=1,
            full=True, attempts=tuple(attempts), stamp_ms=NODE_CLOCK_MS + self.now,
        )  # fmt: skip
        for core in list(self.cores):
            self.step(core, e.StatusReported(status=status))

    def do_result(self, node: str, key: str, outcome: str) -> None:
        job, attempt = key.split("/")
        result = AttemptResult(
            job=job, attempt=int(attempt), node=node, term=1,
            outcome=outcome,  # type: ignore[arg-type]
        )  # fmt: skip
        at = source(len(self.records["results"]), "results")
        self.records["results"].append(e.ResultRead(source=at, result=result))

    def do_advance(self, ms: str) -> None:
        left = int(ms)
        while left > 0:
            self.now += min(left, SLICE_MS)
            left -= SLICE_MS
            for name in list(self.cores):
                self.step(name, e.Tick())
            self.do_land()

    def do_jobs(self) -> None:
        for job in self.reader.jobs.values():
            where = f" on {job.node}" if job.node else ""
            self.lines.append(f"{job.id}: {job.phase}, attempt {job.attempt}{where}")
        for ended in self.reader.ended.values():
            self.lines.append(f"{ended.id}: {ended.phase}, attempt {ended.attempt}")
        leaders = [name for name, core in self.cores.items() if core.role is Role.LEADING]
        self.lines.append(f"leading: {', '.join(leaders) or 'nobody'}")

    def do_explain(self, job: str) -> None:
        found = explain(self.reader, job, self.now)
        self.lines.append(f"{found.code} (position {found.position}): {found.message}")
        self.lines.extend(f"    {reason.node}: {reason.why}" for reason in found.nodes)
