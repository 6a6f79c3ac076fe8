"""The demo's account of what it left on the machine."""

from chaos.demo.leftovers import Leftovers, mounts_of

MOUNTINFO = """\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
31 22 0:27 / /tmp rw,nosuid shared:9 - tmpfs tmpfs rw
44 31 0:51 / /tmp/outrider-x/root rw shared:12 master:3 - tmpfs outrider rw
90 25 0:4 net:[4026532281] /run/netns/other rw shared:77 - nsfs nsfs rw
91 22 0:60 / /var/lib/kubelet/pods/a/volumes/b rw shared:78 - tmpfs tmpfs rw
"""


def test_mounts_of_other_programs_are_not_counted() -> None:
    assert mounts_of(MOUNTINFO) == {"/ ext4", "/tmp tmpfs", "/tmp/outrider-x/root tmpfs"}
    assert "/run/netns/other nsfs" in mounts_of(MOUNTINFO, ("other",))


def test_only_what_is_new_is_told() -> None:
    before = Leftovers(frozenset({(1, "init")}), frozenset({"/a"}), frozenset({"/ ext4"}))
    after = Leftovers(
        frozenset({(1, "init"), (7, "agent")}), frozenset({"/a", "/b"}), frozenset({"/tmp tmpfs"})
    )
    assert Leftovers.new(before, after) == [
        "process left behind: 7 agent", "cgroup left behind: /b", "mount left behind: /tmp tmpfs",
    ]  # fmt: skip
