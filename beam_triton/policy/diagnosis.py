"""Where a job's time goes, and the one setting to change: a pure function of the job's metrics.

A bundle's thread either computes or waits, and both are measured: they add up to the bundles' time.
Computing is Beam and the steps fused with this one, encoding and sending, and decoding. Waiting is divided in
the proportion in which the requests that have been sent are connecting, on the network, in the server's
queue, or computed: whoever waits for a slot, or for the server to take one more request, waits for those. A
slot counts as the reason only where more requests in flight would help: nearly all have been sent, and the
server is not full.

`diagnose` looks for one cause after another, from the outside in, and says what to change where that cause
has at least a quarter of the time to do with it. Where none has, there is nothing to change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# A job says little about itself before it has sent so many requests in so much time.
_LEAST_REQUESTS, _LEAST_SECONDS = 5, 0.5
# What concerns less of the time than this is not worth a change.
_WORTHWHILE = 0.25
_MOST = 0.5

# Of its instances' time; above it a server is full.
_FULL = 0.8
# From here on a server leaves little to be gained elsewhere.
_WELL_USED = 0.6
# The server's queue against its computing, where it is not known how many instances there are.
_FULL_BY_QUEUE = 0.5
# Between these a link is slow: below, something else is; above, the server's copying of bytes.
_SLOW_LINK_BYTES_PER_SECOND = 50e6
# About what Triton compresses.
_COMPRESSOR_BYTES_PER_SECOND = 20e6
_COMPRESSES_WELL = 0.7
# Latencies are known in whole milliseconds.
_LEAST_MILLISECONDS = 0.5
# A network time of so many round trips is the distance, not the bytes.
_DISTANCE_ROUND_TRIPS = 3
# So many connections for each request in flight are not only those of the start.
_ROUNDS = 3
_TUNING = "docs/tuning.md"


@dataclass(frozen=True)
class Distribution:
    """A distribution as Beam keeps it."""

    count: int = 0
    sum: float = 0.0
    minimum: float = 0.0
    maximum: float = 0.0

    @property
    def mean(self) -> float:
        return self.sum / self.count if self.count else 0.0


@dataclass(frozen=True)
class JobMetrics:
    """The library's metrics of a job: those of all its steps and workers together."""

    counters: Mapping[str, int] = field(default_factory=dict)
    distributions: Mapping[str, Distribution] = field(default_factory=dict)

    def count(self, name: str) -> int:
        return self.counters.get(name, 0)

    def seconds(self, name: str) -> float:
        """A counter of microseconds."""
        return self.count(f"{name}_microseconds") / 1e6

    def of(self, name: str) -> Distribution:
        return self.distributions.get(name, Distribution())


@dataclass(frozen=True)
class ServerSettings:
    """What a server says of the model's configuration; None where that is not known."""

    dynamic_batching: bool | None = None


@dataclass(frozen=True)
class Station:
    """A part of the way of a request.

    Attributes:
        share: of the time of the workers' bundles; None where it has none of its own.
        seconds: that a request spends here, on average; None where that cannot be said.
    """

    name: str
    share: float | None
    seconds: float | None


@dataclass(frozen=True)
class Advice:
    """The setting to change.

    Attributes:
        setting: its name.
        where: "pipeline", "runner", "server" or "proxy".
        figure: the measurement that says so.
        change: what to set.
        docs: where to read on.
    """

    setting: str
    where: str
    figure: str
    change: str
    docs: str


@dataclass(frozen=True)
class Explanation:
    """Where a job's time goes, and what to change. ``str()`` of it is a text to read.

    Attributes:
        stations: the parts of a request's way, in order. Their shares add up to 1.
        advice: the setting to change; None: nothing.
        summary: why there is nothing to change, or what the advice is about, in a sentence.
        facts: what else is known, a line each.
    """

    stations: tuple[Station, ...]
    advice: Advice | None
    summary: str
    facts: tuple[str, ...] = ()

    def share(self, name: str) -> float:
        """The share of a station.

        Raises:
            KeyError: there is no such station.
        """
        for station in self.stations:
            if station.name == name:
                return station.share or 0.0
        raise KeyError(name)

    def __str__(self) -> str:
        lines = []
        if self.stations:
            lines.append(f"  {'where the time goes':<26}{'bundles':>9}{'a request':>12}")
        for station in self.stations:
            share = "" if station.share is None else f"{station.share:.1%}"
            lines.append(f"  {station.name:<26}{share:>9}{_duration(station.seconds):>12}".rstrip())
        lines += [f"  {fact}" for fact in self.facts]
        lines.append(self.summary)
        if self.advice is not None:
            lines.append(f"Change: {self.advice.setting} ({self.advice.where}). {self.advice.change}")
            lines.append(f"Because: {self.advice.figure}. See {self.advice.docs}")
        return "\n".join(lines)


BEAM = "Beam and your steps"
BATCH = "waiting for a batch"
ENCODING = "encoding and sending"
SLOT = "waiting for a slot"
CONNECTING = "connecting"
NETWORK = "network"
QUEUE = "the server's queue"
COMPUTING = "the server's computing"
SERVER = "network and server"
DECODING = "decoding"


def diagnose(metrics: JobMetrics, server: ServerSettings | None = None) -> Explanation:
    """Where the time of a job goes, and the one setting to change; ``server`` adds what a job cannot see."""
    job = _Job(metrics, server or ServerSettings())
    if job.calls < _LEAST_REQUESTS or job.bundle_seconds < _LEAST_SECONDS:
        if not job.bundle_seconds:
            summary = "The metrics hold no finished bundle of this library: nothing to say."
            if job.calls:
                summary = (
                    "The metrics do not say how long bundles took: the job took less than a second, or ran "
                    "with an older version of this library."
                )
            return Explanation((), None, summary, job.facts())
        summary = (
            f"Nothing to change: {job.calls:,} requests in {job.bundle_seconds:.1f} s of bundles are too few "
            f"to say what they wait for"
        )
        return Explanation(job.stations(), None, f"{summary}.", job.facts())
    for find in _CAUSES:
        found = find(job)
        if found is not None:
            advice, summary = found if isinstance(found, tuple) else (None, found)
            return Explanation(job.stations(), advice, summary, job.facts())
    most = max(job.shares, key=lambda name: job.shares[name])
    summary = (
        f"Nothing to change: most of the time goes to {most} ({job.shares[most]:.0%}), nothing stands out."
    )
    return Explanation(job.stations(), None, summary, job.facts())


_Found = tuple[Advice, str] | str | None


class _Job:
    """Figures of a job that several causes look at."""

    def __init__(self, metrics: JobMetrics, server: ServerSettings) -> None:
        self.metrics, self.server = metrics, server
        seconds, of = metrics.seconds, metrics.of
        self.calls = of("batch_size").count
        self.answers = max(1, of("request_latency_milliseconds").count)
        self.bundles = metrics.count("bundles")
        self.bundle_seconds = seconds("bundle")
        self.waiting = min(seconds("bundle_wait"), self.bundle_seconds)
        self.busy = self.bundle_seconds - self.waiting
        self.cpu = seconds("bundle_cpu")
        self.batch = of("batch_size").mean
        self.batch_limit = metrics.count("batch_limits") / max(1, metrics.count("limited_batches"))
        self.unfilled = self._per_call("unfilled_batches")
        self.unfilled_for_shape = self._per_call("unfilled_for_shape")
        self.sent_bytes, self.received_bytes = of("request_bytes").sum, of("response_bytes").sum
        self._server_figures()
        self._divide_request()
        self._divide_bundles()

    @property
    def in_flight(self) -> float:
        """Requests that are connecting or have been sent, of a bundle, on average."""
        spent = self.metrics.seconds("answer") + self.metrics.seconds("connecting")
        return spent / self.bundle_seconds if self.bundle_seconds else 0.0

    @property
    def leaves_server_idle(self) -> bool:
        """Whether the job would be much faster if all but the server took no time."""
        if self.busy_instances is not None:
            return self.busy_instances < _WELL_USED
        return not self.is_full

    def _per_call(self, name: str) -> float:
        # Batches that have joined another bundle's request count here, and not as requests.
        return min(1.0, self.metrics.count(name) / max(1, self.calls))

    def _server_figures(self) -> None:
        count, seconds = self.metrics.count, self.metrics.seconds
        requests = count("server_requests")
        self.knows_server = requests > 0
        self.queue = self.computing = 0.0
        self.others = self.joined = 0.0
        self.is_full: bool | None = None
        self.busy_instances: float | None = None
        if not requests:
            return
        total = seconds("server") / requests
        self.queue = seconds("server_queue") / requests
        # An ensemble's models compute, and wait, without its own counts.
        self.computing = max(seconds("server_compute") / requests, total - self.queue)
        workers = max(1, count("workers"))
        self.others = max(0.0, 1 - workers * count("server_requests_of_job") / requests)
        executions = count("server_executions")
        self.joined = requests / executions if executions else 1.0
        instances = seconds("server_instance")
        if instances:
            # An execution counts when it ends, however long before the first look it began.
            self.busy_instances = min(1.0, seconds("server_busy") / instances)
            self.is_full = self.busy_instances >= _FULL
        elif self.computing:
            self.is_full = self.queue >= _FULL_BY_QUEUE * self.computing

    def _divide_request(self) -> None:
        """What a request that has been sent spends where, in seconds."""
        seconds, answers = self.metrics.seconds, self.answers
        self.answer = seconds("answer") / answers
        # While the thread does something else an answer waits for it, or does not: nobody can tell.
        waited = max(0.0, self.answer - seconds("answer_busy") / answers)
        self.connecting = seconds("connecting") / answers
        server = self.queue + self.computing
        if server > self.answer > 0:
            # Those of others, which the server counts as well, took longer.
            self.queue, self.computing = (
                self.answer * part / server for part in (self.queue, self.computing)
            )
            server = self.answer
        self.network = max(0.0, waited - server)
        self.slot = seconds("slot_wait") / max(1, self.calls)
        self.admission = seconds("admission_wait") / max(1, self.calls)

    def _divide_bundles(self) -> None:
        """The shares of the bundles' time."""
        seconds, whole = self.metrics.seconds, self.bundle_seconds or 1.0
        decoding = min(seconds("decoding"), self.busy)
        encoding = min(max(0.0, seconds("sending") - decoding), self.busy - decoding)
        waits = {CONNECTING: self.connecting}
        if self.knows_server:
            waits |= {NETWORK: self.network, QUEUE: self.queue, COMPUTING: self.computing}
        else:
            waits[SERVER] = self.answer or 1.0
        slot = 0.0
        if not self.is_full and self.admission < _WORTHWHILE * self.answer:
            slot = min(seconds("slot_wait"), self.waiting)
        left, total = self.waiting - slot, sum(waits.values())
        self.shares = {
            BEAM: (self.busy - encoding - decoding) / whole,
            ENCODING: encoding / whole,
            SLOT: slot / whole,
            **{name: left * part / total / whole if total else 0.0 for name, part in waits.items()},
            DECODING: decoding / whole,
        }

    def stations(self) -> tuple[Station, ...]:
        """The parts of a request's way."""
        seconds, calls = self.metrics.seconds, max(1, self.calls)
        batch = seconds("batch_wait") / calls
        spent: dict[str, float | None] = {
            BEAM: None,
            ENCODING: max(0.0, seconds("sending") - seconds("decoding")) / calls,
            SLOT: self.slot + self.admission,
            CONNECTING: self.connecting,
            NETWORK: self.network,
            QUEUE: self.queue,
            COMPUTING: self.computing,
            SERVER: self.answer,
            DECODING: seconds("decoding") / calls,
        }
        stations = [Station(name, share, spent[name]) for name, share in self.shares.items()]
        return (stations[0], Station(BATCH, None, batch), *stations[1:])

    def facts(self) -> tuple[str, ...]:
        """What else says how the job is doing."""
        facts = []
        if self.calls:
            limit = f" of {self.batch_limit:,.0f}" if self.batch_limit else ""
            per_bundle = f", {self.calls / self.bundles:,.1f} requests a bundle" if self.bundles else ""
            facts.append(
                f"{self.batch:,.1f}{limit} elements a request{per_bundle}, {self.in_flight:.1f} in flight on "
                f"a bundle's thread"
            )
        if self.busy_instances is not None:
            facts.append(
                f"the model's instances are busy {self.busy_instances:.0%} of the time, "
                f"{self.others:.0%} of its requests are others'"
            )
        failures = self.metrics.count("failures") + self.metrics.count("default_values")
        retries = self.metrics.count("retries")
        if failures or retries:
            facts.append(f"{failures:,} elements failed, {retries:,} requests were sent again")
        return tuple(facts)

    @property
    def beam(self) -> float:
        return self.shares[BEAM]

    @property
    def network_share(self) -> float:
        return self.shares.get(NETWORK, 0.0)

    @property
    def server_share(self) -> float:
        return sum(self.shares.get(name, 0.0) for name in (QUEUE, COMPUTING, SERVER))

    @property
    def of_limit(self) -> str:
        """How full requests are, in words."""
        return f"{self.batch:,.1f} elements a request, where one may hold {self.batch_limit:,.0f}"


def _idle_workers(job: _Job) -> _Found:
    """Workers that wait for elements are fast enough."""
    worker = job.metrics.seconds("worker")
    if not worker or job.bundle_seconds >= _WORTHWHILE * worker:
        return None
    if job.metrics.seconds("worker_cpu") >= _WORTHWHILE * worker:
        return None
    return (
        f"Nothing to change: bundles are open {job.bundle_seconds / worker:.0%} of the workers' time, which "
        f"wait for elements or for the runner."
    )


def _connections(job: _Job) -> _Found:
    """Requests that connect, or wait for a connection."""
    share = job.shares[CONNECTING]
    if share < _WORTHWHILE:
        return None
    waits = job.metrics.count("connection_waits")
    if waits >= _WORTHWHILE * job.calls:
        return (
            Advice(
                "pool.max_total",
                "pipeline",
                f"{waits:,} of {job.calls:,} requests waited for a connection, {_ms(job.connecting)} each",
                "Raise it to max_concurrent_requests at least, or leave pool out.",
                f"{_TUNING}#connections-pool",
            ),
            f"The job waits for connections ({share:.0%} of the bundles' time).",
        )
    opened = job.metrics.count("connections_opened")
    if opened <= _ROUNDS * job.in_flight:
        # Each request at the start of a job opens the connection that a later one would have reused.
        return None
    return (
        Advice(
            "keep-alive",
            "server or proxy",
            f"{opened:,} connections were opened for {job.calls:,} requests, {_ms(job.connecting)} a request",
            "Let it keep idle connections open (nginx: keepalive_timeout, keepalive_requests), and leave "
            "reuse_enabled on.",
            f"{_TUNING}#connections-pool",
        ),
        f"The job opens connections ({share:.0%} of the bundles' time): something closes them.",
    )


def _compression(job: _Job) -> _Found:
    """Answers that come compressed over a link that does not need it."""
    share = job.network_share + job.shares.get(SERVER, 0.0) + job.shares[DECODING]
    unasked = job.metrics.count("unasked_compressed_answers")
    asked = job.metrics.count("compressed_answers")
    if share < _WORTHWHILE or unasked + asked < _MOST * job.answers:
        return None
    decoding = job.metrics.seconds("decoding") / job.answers
    cost = f"network and decoding take {_ms(job.network + decoding)} of a request"
    summary = f"Compressing the answers costs more than sending them ({share:.0%} of the bundles' time)."
    if unasked >= asked:
        return (
            Advice(
                "Accept-Encoding",
                "proxy",
                f"{unasked:,} of {job.answers:,} answers came compressed though nobody asked for it; {cost}",
                "The proxy asks the server for gzip, or compresses by itself, for clients that did not ask. "
                "In nginx, remove proxy_set_header Accept-Encoding.",
                f"{_TUNING}#compression",
            ),
            summary,
        )
    compressed = job.metrics.count("sampled_answer_compressed_bytes")
    ratio = compressed / (job.metrics.count("sampled_answer_bytes") or 1) or 1.0
    whole_bytes = job.received_bytes / job.answers / ratio
    if job.network and whole_bytes / job.network < _WORTHWHILE * _COMPRESSOR_BYTES_PER_SECOND:
        # Slower than any compressor: the link.
        return None
    return (
        Advice(
            "response_compression",
            "pipeline",
            f"{asked:,} of {job.answers:,} answers came compressed; {cost}",
            "Leave it out: Triton compresses about 20 MB/s.",
            f"{_TUNING}#compression",
        ),
        summary,
    )


def _busy_with_others(job: _Job) -> _Found:
    """A server that others keep full."""
    if not job.is_full or job.others < _MOST or job.server_share < _WORTHWHILE:
        return None
    return (
        Advice(
            "instance_group",
            "server",
            f"{_fullness(job)}, and {job.others:.0%} of its requests are not this job's",
            "Add instances (count), or servers to the endpoint list; no setting of the job makes room.",
            "docs/explain.md#a-busy-server",
        ),
        f"The server is full with others' requests: the job waits for it {job.server_share:.0%} of the time.",
    )


def _ragged(job: _Job) -> _Found:
    """Elements of many shapes, which do not share requests."""
    if job.unfilled_for_shape < 0.3 or job.batch > _MOST * job.batch_limit or job.beam > 1 - _WORTHWHILE / 2:
        return None
    return (
        Advice(
            "batching.bucket_boundaries",
            "pipeline",
            f"{job.unfilled_for_shape:.0%} of the requests left unfilled because their elements' shapes "
            f"differ: {job.of_limit}",
            "Give the lengths to pad to, each twice the one before, such as [32, 64, 128, 256]. The model "
            "must ignore padding.",
            f"{_TUNING}#elements-of-many-lengths-batchingbucket_boundaries",
        ),
        "Elements of different shapes do not share requests.",
    )


def _tiny_bundles(job: _Job) -> _Found:
    """Bundles that end before a request is full."""
    if job.unfilled < _MOST or job.unfilled_for_shape >= 0.3 or job.beam > 1 - _WORTHWHILE:
        return None
    if job.batch > _WORTHWHILE * job.batch_limit:
        return None
    elements = job.metrics.count("elements") / max(1, job.bundles)
    return (
        Advice(
            "bundle size",
            "runner",
            f"a bundle has {elements:,.1f} elements: {job.of_limit}",
            "Make bundles larger: Flink --max_bundle_size and --max_bundle_time_millis; elsewhere, put "
            "GroupIntoBatches or BatchElements before, and score with TritonBatchInference.",
            f"{_TUNING}#batch-size-batching",
        ),
        "Bundles are too small to fill requests, and each one waits for its own.",
    )


def _full_server(job: _Job) -> _Found:
    """A server that this job uses fully: as it should be."""
    if not job.is_full or job.server_share < _WORTHWHILE:
        return None
    is_alone = job.joined < 1.05 and job.batch <= _WORTHWHILE * job.batch_limit
    if is_alone and job.server.dynamic_batching is False:
        return (
            Advice(
                "dynamic_batching",
                "server",
                f"{_fullness(job)}, and each request is executed alone: {job.of_limit}",
                "Add dynamic_batching { } to the model's configuration.",
                f"{_TUNING}#batch-size-batching",
            ),
            "The server is full, and could execute several requests at once.",
        )
    return (
        f"Nothing to change: the job uses its server fully ({_fullness(job)}). Faster is a model of more "
        f"instances, where there is room for them, or more servers."
    )


def _slots(job: _Job) -> _Found:
    """Fewer requests in flight than the server could take."""
    share = job.shares[SLOT]
    if share < _WORTHWHILE or not job.leaves_server_idle:
        return None
    idle, room = "", "whether the server could take more is not known"
    if job.busy_instances is not None:
        idle = f", and the model's instances are idle {1 - job.busy_instances:.0%} of it"
        room = "the server could take more"
    return (
        Advice(
            "max_concurrent_requests",
            "pipeline",
            f"bundles wait for a slot {share:.0%} of their time{idle}",
            "Double it, and again while elements/s rise.",
            f"{_TUNING}#requests-in-flight-max_concurrent_requests",
        ),
        f"All requests that the job may have in flight are, and {room}.",
    )


def _slow_link(job: _Job) -> _Found:
    """A link that is slow for its bytes, or long."""
    share = job.network_share
    if share < _WORTHWHILE or job.network < job.queue + job.computing or not job.leaves_server_idle:
        return None
    round_trip = job.metrics.of("round_trip_microseconds").minimum / 1e6
    if round_trip and job.network <= _DISTANCE_ROUND_TRIPS * round_trip:
        if round_trip < 0.002:
            return None
        return (
            Advice(
                "region",
                "runner",
                f"a round trip to the server takes {_ms(round_trip)}, the network {_ms(job.network)} of a "
                f"request",
                "Run the workers near the server; until then, larger bundles and requests pay for fewer "
                "round trips.",
                "docs/explain.md#a-slow-link",
            ),
            f"The server is far away: the job waits for the network {share:.0%} of the time.",
        )
    rate = (job.sent_bytes + job.received_bytes) / (share * job.bundle_seconds)
    # What the fastest request shows: it may have been a small one, or have had the link for itself.
    fastest = max(job.metrics.of("request_latency_milliseconds").minimum, _LEAST_MILLISECONDS) / 1e3
    nbytes = (job.sent_bytes + job.received_bytes) / job.answers
    fastest_rate = nbytes / max(fastest - job.computing, _LEAST_MILLISECONDS / 1e3)
    if max(rate, fastest_rate) > _SLOW_LINK_BYTES_PER_SECOND:
        return None
    sends_more = job.sent_bytes >= job.received_bytes
    kind, option = ("request", "compression") if sends_more else ("answer", "response_compression")
    sampled = job.metrics.count(f"sampled_{kind}_bytes")
    ratio = job.metrics.count(f"sampled_{kind}_compressed_bytes") / sampled if sampled else 1.0
    figure = f"{_size(rate)}/s over the network, which takes {_ms(job.network)} of a request"
    summary = f"The link is slow: the job waits for the network {share:.0%} of the time."
    compressed = job.metrics.count("compressed_answers") >= _MOST * job.answers
    if kind == "answer" and compressed:
        sample = "the answers are compressed already"
    elif sampled:
        sample = f"a sample of the {kind}s compresses to {ratio:.0%} only"
    else:
        sample = f"whether the {kind}s would compress is not known"
    if ratio <= _COMPRESSES_WELL and not (kind == "answer" and compressed):
        return (
            Advice(
                option,
                "pipeline",
                f"{figure}; a sample of the {kind}s compresses to {ratio:.0%}",
                f'Set {option}="gzip".',
                f"{_TUNING}#compression",
            ),
            summary,
        )
    return (
        Advice(
            "region",
            "runner",
            f"{figure}; {sample}",
            "Run the workers near the server, or send less: a model that takes FP16 or UINT8.",
            "docs/explain.md#a-slow-link",
        ),
        summary,
    )


def _busy_worker(job: _Job) -> _Found:
    """Workers that compute while the server has time."""
    share = job.busy / job.bundle_seconds
    if share < 1 - _WORTHWHILE or not job.leaves_server_idle:
        return None
    idle = ""
    if job.busy_instances is not None:
        idle = f", while the model's instances are idle {1 - job.busy_instances:.0%} of it"
    worker = job.metrics.seconds("worker")
    is_cpu = job.cpu >= _WORTHWHILE * job.busy
    takes_turns = worker > 0 and job.metrics.seconds("worker_cpu") >= _FULL * worker
    if is_cpu or takes_turns:
        of_library = job.shares[ENCODING] + job.shares[DECODING]
        return (
            Advice(
                "worker processes",
                "runner",
                f"bundles compute {share:.0%} of their time, {of_library:.0%} in this library's encoding and "
                f"decoding{idle}",
                "More processes, not threads: Dataflow --num_workers or machines of more vCPUs, Flink "
                "--parallelism, DirectRunner --direct_num_workers with --direct_running_mode="
                "multi_processing. Steps on NumPy batches (TritonBatchInference) take less CPU.",
                "docs/explain.md#a-worker-bound-by-its-cpu",
            ),
            f"The workers' CPU is the limit: the job waits only {1 - share:.0%} of the time.",
        )
    return (
        Advice(
            "beam.Reshuffle()",
            "pipeline",
            f"bundles are in other steps {job.beam:.0%} of their time, and have a CPU only "
            f"{job.cpu / job.bundle_seconds:.0%} of it{idle}",
            "Put it between the step that waits (for files, services, locks) and this one, so that both run "
            "at once; or give that step more threads.",
            "docs/explain.md#a-worker-bound-by-its-cpu",
        ),
        "A step that is fused with this one waits, and the job with it.",
    )


def _fullness(job: _Job) -> str:
    if job.busy_instances is not None:
        return f"the model's instances are busy {job.busy_instances:.0%} of the time"
    return (
        f"requests wait {job.queue * 1e3:.1f} ms in its queue for {job.computing * 1e3:.1f} ms of computing"
    )


# In this order: what is wrong on the way to the server makes all that follows look wrong.
_CAUSES = (
    _idle_workers,
    _connections,
    _compression,
    _busy_with_others,
    _ragged,
    _tiny_bundles,
    _full_server,
    _slots,
    _slow_link,
    _busy_worker,
)


def _duration(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:,.2f} ms"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.0f} kB"
