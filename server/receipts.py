"""Keep the owners' receipts, with which a ledger that was cut short or rolled back is found out."""

import json
from collections.abc import Iterable
from pathlib import Path

from shared.errors import InputError
from shared.files import write_json
from shared.privacy.chain import Receipt
from shared.wire.messages import TrainReply

_NAME = "receipts.json"


def keep_receipts(run_dir: Path, replies: Iterable[TrainReply]) -> None:
    """Put each owner's last receipt into ``run_dir/receipts.json``.

    Raises:
        InputError: an owner signs for another ledger than before, or the file cannot be used.
    """
    kept = read_receipts(run_dir)
    for reply in replies:
        if reply.receipt is None:
            continue
        before = kept.get(reply.owner)
        if before is not None and before.data_source != reply.receipt.data_source:
            raise InputError(
                f"{reply.owner} signed for the ledger of {before.data_source!r} and now signs for that of"
                f" {reply.receipt.data_source!r}. Ask its owner; the run stops here."
            )
        if before is None or reply.receipt.number >= before.number:
            kept[reply.owner] = reply.receipt
    write_json(run_dir / _NAME, {owner: receipt.to_dict() for owner, receipt in sorted(kept.items())})


def read_receipts(run_dir: Path) -> dict[str, Receipt]:
    """The last receipt of each owner, by name; none before the first round."""
    path = run_dir / _NAME
    if not path.exists():
        return {}
    try:
        return {owner: Receipt.from_dict(values) for owner, values in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({error}). Move it away, and ask the owners to verify.") from None
