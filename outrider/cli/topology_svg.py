"""`nodes NODE --svg FILE`: a node's topology as a picture.

Boxes of NUMA domains with their cores, GPUs and adapters; NVLinks as lines, as thick as they are
many; the matrix beneath for the exact words. Plain SVG, no fonts or scripts from elsewhere.
"""

from collections.abc import Iterator
from math import ceil
from typing import TYPE_CHECKING, Final, NamedTuple
from xml.sax.saxutils import escape

from idl.topology import GpuInfo, NumaInfo, Topology
from idl.units import format_bytes
from outrider.cli.topology import holders, link_word

if TYPE_CHECKING:
    from dataplane.core.nodes import Node

_DOMAIN_WIDTH: Final = 330
_GAP: Final = 40
_GPU_WIDTH: Final = 140
_GPU_HEIGHT: Final = 46
_CORE: Final = 9
"""A core's square with its gap; thirty fit a row."""
_CORES_IN_ROW: Final = 32
_TOP: Final = 70
_COLUMNS_MAX: Final = 4
_LINKS_DRAWN_MAX: Final = 120
"""Pairs: behind NVSwitch all are equal, and beyond this a sentence says more than lines."""

_STYLE: Final = """<style>
text{font-family:sans-serif;font-size:12px;fill:#222}
.title{font-size:16px;font-weight:bold}.small{font-size:10px;fill:#555}
.domain{fill:#f4f6f8;stroke:#8a97a5}.core{fill:#b8c7d6}.pinned{fill:#d98e32}
.gpu{fill:#dff0d8;stroke:#5b8c4a}.held{fill:#f6d9b0;stroke:#b9762b}.ill{fill:#f2c7c7;stroke:#a33}
.nic{fill:#e6e0f3;stroke:#7a68a6}.link{stroke:#3b7d23;fill:none;opacity:.55}
</style>"""


class _Box(NamedTuple):
    x: int
    y: int
    width: int
    height: int


def _domain_height(topology: Topology, domain: NumaInfo) -> int:
    gpus = [gpu for gpu in topology.gpus if gpu.numa_node == domain.id]
    nics = [nic for nic in topology.nics if nic.numa_node == domain.id]
    core_rows = ceil(len(domain.cores) / _CORES_IN_ROW)
    gpu_rows = ceil(len(gpus) / 2)
    return 62 + core_rows * _CORE + gpu_rows * (_GPU_HEIGHT + 24) + 20 * ceil(len(nics) / 3)


def topology_svg(node: "Node") -> str:
    """The picture, as a document of its own."""
    topology = node.topology
    columns = min(len(topology.numa), _COLUMNS_MAX) or 1
    height = max((_domain_height(topology, one) for one in topology.numa), default=60)
    boxes = {
        domain.id: _Box(
            _GAP + at % columns * (_DOMAIN_WIDTH + _GAP),
            _TOP + at // columns * (height + _GAP),
            _DOMAIN_WIDTH,
            height,
        )
        for at, domain in enumerate(topology.numa)
    }
    rows = ceil(len(topology.numa) / columns)
    matrix_top = _TOP + rows * (height + _GAP) + 30
    width = max(_GAP + columns * (_DOMAIN_WIDTH + _GAP), 2 * _GAP + 60 + 52 * len(topology.gpus))
    total = matrix_top + 18 * (len(topology.gpus) + 2)
    gpus = _gpu_boxes(topology, boxes)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{total}" '
        f'viewBox="0 0 {width} {total}">',
        _STYLE,
        f'<rect width="{width}" height="{total}" fill="white"/>',
        _text(_GAP, 30, _title(node), "title"),
        _text(_GAP, 48, _legend(topology), "small"),
        *(line for one in topology.numa for line in _domain(node, one, boxes[one.id])),
        *_links(topology, gpus),
        *(line for gpu in topology.gpus for line in _gpu(node, gpu, gpus.get(gpu.index))),
        *_matrix(topology, matrix_top),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    chosen = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}"{chosen}>{escape(words)}</text>'


def _title(node: "Node") -> str:
    played = f" (simulated: plays {node.topology.profile}, jobs get no device)"
    return f"{node.name}{played if node.simulated else ''}"


def _legend(topology: Topology) -> str:
    words = ["squares: cores (orange: pinned)", "green lines: NVLinks, thicker is more"]
    links = {link for row in topology.nvlinks for link in row if link}
    if _uniform(topology):
        words.append(f"every pair of GPUs: {links.pop()} NVLinks through switches")
    return "; ".join(words)


def _uniform(topology: Topology) -> bool:
    """Every pair alike: behind NVSwitch."""
    links = {link_word(topology, i, j) for i in range(len(topology.gpus)) for j in range(i)}
    return len(topology.gpus) > 2 and len(links) == 1 and all(w.startswith("NV") for w in links)


def _domain(node: "Node", domain: NumaInfo, box: _Box) -> Iterator[str]:
    yield (
        f'<rect class="domain" x="{box.x}" y="{box.y}" width="{box.width}" '
        f'height="{box.height}" rx="6"/>'
    )
    package = f", package {domain.package}" if domain.package >= 0 else ""
    memory = format_bytes(domain.memory_bytes)
    yield _text(box.x + 10, box.y + 20, f"NUMA {domain.id}{package}: {memory}")
    yield _text(box.x + 10, box.y + 34, f"CPUs {domain.cpus}", "small")
    for at, core in enumerate(domain.cores):
        x = box.x + 10 + at % _CORES_IN_ROW * _CORE
        y = box.y + 42 + at // _CORES_IN_ROW * _CORE
        kind = "pinned" if node.held.cpus.intersection(core) else "core"
        words = f"core of CPUs {', '.join(map(str, core))}"
        yield (
            f'<rect class="{kind}" x="{x}" y="{y}" width="{_CORE - 2}" height="{_CORE - 2}">'
            f"<title>{words}</title></rect>"
        )
    nics = [nic for nic in node.topology.nics if nic.numa_node == domain.id]
    for at, nic in enumerate(nics):
        x = box.x + 10 + at % 3 * 104
        y = box.y + box.height - 22 * (ceil(len(nics) / 3) - at // 3)
        yield f'<rect class="nic" x="{x}" y="{y}" width="98" height="17" rx="3"/>'
        yield _text(x + 6, y + 12, nic.name, "small")


def _gpu_boxes(topology: Topology, domains: dict[int, _Box]) -> dict[int, _Box]:
    """Two in a row, the second row moved aside so that lines do not lie on each other."""
    boxes = {}
    for domain in topology.numa:
        box = domains[domain.id]
        own = [gpu for gpu in topology.gpus if gpu.numa_node == domain.id]
        top = box.y + 52 + ceil(len(domain.cores) / _CORES_IN_ROW) * _CORE
        for at, gpu in enumerate(own):
            x = box.x + 10 + at % 2 * (_GPU_WIDTH + 20) + at // 2 % 2 * 10
            boxes[gpu.index] = _Box(x, top + at // 2 * (_GPU_HEIGHT + 24), _GPU_WIDTH, _GPU_HEIGHT)
    return boxes


def _gpu(node: "Node", gpu: GpuInfo, box: _Box | None) -> Iterator[str]:
    if box is None:
        return
    held = holders(node).get(gpu.index, "")
    kind = "ill" if gpu.unhealthy else "held" if held else "gpu"
    words = gpu.unhealthy or (f"held by {held}" if held else gpu.uuid)
    yield (
        f'<rect class="{kind}" x="{box.x}" y="{box.y}" width="{box.width}" '
        f'height="{box.height}" rx="4"><title>{escape(words)}</title></rect>'
    )
    yield _text(box.x + 6, box.y + 15, f"GPU {gpu.index}  {format_bytes(gpu.memory_bytes)}")
    name = gpu.product_name.removeprefix("NVIDIA ").removeprefix("Tesla ")
    yield _text(box.x + 6, box.y + 28, name[:24], "small")
    parts = " ".join(part.profile for part in gpu.mig)
    yield _text(box.x + 6, box.y + 40, parts[:26] or gpu.pcie_bus_id, "small")


def _links(topology: Topology, boxes: dict[int, _Box]) -> Iterator[str]:
    if _uniform(topology):
        return  # the legend says it; 28 equal lines would say less
    drawn = 0
    for row, one in enumerate(topology.gpus):
        for column in range(row):
            other = topology.gpus[column]
            links = topology.nvlinks[row][column] if topology.nvlinks else 0
            if not links or one.index not in boxes or other.index not in boxes:
                continue
            drawn += 1
            if drawn > _LINKS_DRAWN_MAX:
                return
            yield _curve(boxes[other.index], boxes[one.index], links)


def _curve(a: _Box, b: _Box, links: int) -> str:
    """From middle to middle, bent so that it passes beside what lies between."""
    ax, ay = a.x + a.width / 2, a.y + a.height / 2
    bx, by = b.x + b.width / 2, b.y + b.height / 2
    bend = 0.12
    mx, my = (ax + bx) / 2 + (by - ay) * bend, (ay + by) / 2 - (bx - ax) * bend
    return (
        f'<path class="link" stroke-width="{1.5 * links:g}" '
        f'd="M{ax:g},{ay:g} Q{mx:g},{my:g} {bx:g},{by:g}"/>'
    )


def _matrix(topology: Topology, top: int) -> Iterator[str]:
    for column, gpu in enumerate(topology.gpus):
        yield _text(_GAP + 60 + 52 * column, top, f"GPU{gpu.index}", "small")
    for row, gpu in enumerate(topology.gpus):
        y = top + 18 * (row + 1)
        yield _text(_GAP, y, f"GPU{gpu.index}", "small")
        for column in range(len(topology.gpus)):
            word = link_word(topology, row, column)
            yield _text(_GAP + 60 + 52 * column, y, word, "" if row != column else "small")
