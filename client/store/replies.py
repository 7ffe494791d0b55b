"""Replies an owner has committed to, kept so that a repeated request gets the same bytes."""

import json
from pathlib import Path

import safetensors.numpy
from safetensors import SafetensorError, safe_open

from shared.files import sha256, write_atomically
from shared.privacy.chain import Receipt
from shared.privacy.releases import release_from_dict
from shared.wire.arrays import answered_shapes
from shared.wire.messages import TrainJob, TrainReply

# The server asks for the round after its last checkpoint, or for the one before where that
# checkpoint was torn; older replies are in the aggregate already.
_KEPT_ROUNDS = 2


def save_reply(directory: Path, job: TrainJob, reply: TrainReply) -> None:
    """Keep ``reply`` to ``job`` under ``directory``, and forget replies too old to be asked for again."""
    fields = {
        "owner": reply.owner,
        "release": reply.release.to_dict() if reply.release else None,
        "receipt": reply.receipt.to_dict() if reply.receipt else None,
        "simulation_only": dict(reply.simulation_only),
        "job_digest": job.digest,
    }
    path = _path(directory, job)
    write_atomically(path, safetensors.numpy.save(reply.weights, metadata={"reply": json.dumps(fields)}))
    for old in sorted(path.parent.glob("*.safetensors"), key=lambda kept: int(kept.stem))[:-_KEPT_ROUNDS]:
        old.unlink(missing_ok=True)


def load_reply(directory: Path, job: TrainJob) -> TrainReply | None:
    """The reply kept for exactly this ``job``, or None where there is none or it cannot be read."""
    try:
        with safe_open(_path(directory, job), framework="numpy") as stored:
            fields = json.loads(stored.metadata()["reply"])
            # In the request's order: safetensors sorts names, and the reply must repeat byte for byte.
            weights = {name: stored.get_tensor(name) for name in answered_shapes(job)}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    if fields["job_digest"] != job.digest:
        return None
    release, receipt = fields["release"], fields["receipt"]
    return TrainReply(
        owner=fields["owner"],
        server_round=job.plan.server_round,
        weights=weights,
        release=release_from_dict(release) if release else None,
        receipt=Receipt.from_dict(receipt) if receipt else None,
        simulation_only=fields["simulation_only"],
    )


def _path(directory: Path, job: TrainJob) -> Path:
    # The run's name comes from the server: hashed, so that it cannot name a place of its own.
    return directory / "replies" / sha256(job.run_id.encode())[:16] / f"{job.plan.server_round:05d}.safetensors"
