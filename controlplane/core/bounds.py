"""Bounds and periods of the coordinator core that are nobody else's business, with their reasons.

Bounds that are a contract between processes are in `idl.limits`.
"""

from typing import Final

from idl.limits import INBOX_RECORDS_MAX, LEDGER_BATCH_DECISIONS_MAX
from idl.units import KIB

RECORDS_PER_READ_MAX: Final = 500
"""Records that the driver hands in at once per stream: what may still come after a pause."""
INBOX_RESUME_SHARE: Final = 0.5
"""A paused stream resumes when its inbox is down to this share: no on-off at every record."""
LIVE_RESUME_SHARE: Final = 0.9
"""A queue paused for its live jobs resumes at this share of the bound."""
RESULTS_INBOX_MAX: Final = INBOX_RECORDS_MAX
COMMANDS_INBOX_MAX: Final = 200
"""Operators are few; a flood of commands waits in Kafka."""
RESULT_DECISIONS_MAX: Final = LEDGER_BATCH_DECISIONS_MAX // 2
"""Share of a batch for ends of attempts: the room they free shall be filled by the same batch."""
DECISION_BYTES: Final = 320
"""Estimate of a decision's encoding without its free text and spec."""
DEAD_LETTERS_DUE_MAX: Final = 1_000
"""Admission waits while more dead letters than this are not yet in Kafka: a flood of poisoned
records must not pile up in memory."""
DEAD_LETTER_RESEND_MS: Final = 30_000
"""A dead letter not confirmed after this is ordered again; the driver retries long before."""

INTENT_ITEMS_MAX: Final = 128
INTENT_BYTES_MAX: Final = 160 * KIB
"""Estimate; a DDS message stays below 256 KiB even where JSON escapes make it longer."""
INTENT_ITEM_BYTES: Final = 400
"""Estimate of an intent item without its spec."""

APPEND_RETRY_MS: Final = 100
APPEND_RETRY_MS_MAX: Final = 2_000
"""Backoff between appends of the same entry; Kafka's own client has retried before we do."""
APPEND_STALL_MS: Final = 3_000
"""An append not read back after this is shown as a stall (a killed broker takes 2.2 s)."""

ENTRY_GAP_MS_MAX: Final = 20
"""From one entry to the next under load: 50 entries a second, however many jobs. It is a quarter of
the time that one of 32 slots has at 400 jobs a second."""
ENTRY_GAP_ATTEMPTS: Final = 4
"""With so few attempts out each waits for the entry before it, and company would not come."""
ENTRY_FULL_DECISIONS: Final = LEDGER_BATCH_DECISIONS_MAX // 4
"""An entry of so many had company enough: the next follows at once."""

LOST_CHECK_MS: Final = 250
"""How often silence of nodes is looked for: O(nodes)."""
IDLE_TICK_MS: Final = 500
"""A leader is woken at least this often."""
SELF_PAUSE_MS: Final = 3_000
"""A leader that was not woken for this long was itself asleep: it cannot tell the silence of nodes
from its own deafness and starts to count anew."""
ATTEMPT_MISSING_MS: Final = 5_000
"""A node that knew an attempt and leaves it out of its full lists for this long forgot it."""
RESTARTED_NODE_MISSING_MS: Final = 2_000
"""The same after a restart of the agent: time for results that its former self wrote to be read."""
ATTEMPT_NOT_TAKEN_MS: Final = 60_000
"""A node that reports and never lists an attempt that it was told about, again and again."""
ENDED_WITHOUT_RESULT_MS: Final = 600_000
"""A node says `ended` for this long and no result came: it was lost or cannot be understood."""
WAITING_GRACE_MS: Final = 2_000
"""A new leader says `NoNodes` only after nodes had time to report."""
QUEUE_STATE_MS: Final = 500
"""Depth changes are published at most this often per queue; admission changes at once."""
NODE_CHECKS_MAX: Final = 20_000
"""Nodes looked at in one scheduling cycle, at half a microsecond each: keeps it near 10 ms, and a
microsecond more for each shape that waits. A shape is looked at on all its nodes or on none; the
rest of the shapes is for the next cycle."""
HEAD_CHECKS_MAX: Final = NODE_CHECKS_MAX // 2
"""Those of them for the head of the queue while shapes further back have their turn. A head that
got all would starve the rest, one that got none would lose its precedence."""
SHAPE_CHECKS: Final = 16
"""What a shape counts as that is looked at on no node at all."""
MATCHES_KEPT_MAX: Final = 200_000
"""Nodes remembered as matching, over all kinds of shapes: some 10 MB. Beyond that all is forgotten
and found again."""
KIND_SIZE: Final = 10
"""A kind of shapes takes as much memory as so many of those nodes, even if it has none."""
DEVICE_CHECKS: Final = 100
"""What a look at devices counts as, and a choice among them: 20 to 160 µs each. Twice as many where
whole cores are asked for."""
WAITING_CHECKS_MAX: Final = 5_000
"""Shapes, and for each of which the reason is not known nodes, looked at in one cycle to say why
jobs fit nowhere: about 10 ms. What is left is for the next cycles: nobody waits for those words,
and while they are found the leader hears nobody."""
WAITING_CHECK_COST: Final = 4
"""In checks of the scheduler: here every word is found, not only that there is one."""
NODES_MAX: Final = 10_000
"""Nodes a coordinator listens to (facts: beyond a few thousand, cells)."""
DIGESTS_KEPT: Final = 4_096
"""Ledger offsets whose digest is remembered: more than ten seconds of a busy leader, so that its
beacon finds its own place in a standby that is ahead of it."""
CLAIMS_MAX: Final = 64
"""Beacons ahead of this process that wait to be compared; it catches up or was never compared."""
LEASE_RENEWALS: Final = 6
"""Renewals within one lease of an exclusive attempt: several may be lost, and an idle leader writes
one small entry every two seconds."""
LEASE_LOOK_MS: Final = 100
"""How often due renewals are looked for: O(exclusive attempts that are out)."""
LEASE_DRIFT_PER_MILLE: Final = 10
"""Of a lease: how much faster a leader's clock may run than a node's. Crystals are within 0.1 per
mille, clocks of guests under a busy hypervisor within about 1."""
LEASE_KILL_MS: Final = 2_000
"""From the end of a lease on the node to the death of its processes: the launcher wakes within a
second even after its host slept, the agent kills a launcher that does not answer within another."""
