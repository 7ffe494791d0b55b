"""Check, copy and bring back an owner's ledger for the command line."""

import json
import re
from pathlib import Path

from rich.console import Console

from client.policy import Policy
from client.screen import print_json, say, warn
from client.state import KEY, LEDGER, ledger_in, public_key_in, require_folder
from client.store.keys import OwnerKey
from client.store.lifetime import LifetimeLedger
from client.store.verification import verify
from shared.errors import InputError
from shared.files import write_json
from shared.privacy.chain import Receipt


def verify_ledger(directory: Path, *, receipt: Path | None, key: str | None, as_json: bool) -> bool:
    """Print what the ledger holds and all that is wrong with it; return whether nothing is."""
    path = ledger_in(directory)
    if key is not None and not re.fullmatch("[0-9a-fA-F]{64}", key):
        raise InputError(f"--key takes the 64 hex digits of a public key, not {key!r:.80}.")
    public_key = key.lower() if key else public_key_in(directory)
    found = verify(path, public_key=public_key, receipt=_read_receipt(receipt) if receipt else None)
    if as_json:
        print_json(
            {
                "ok": found.ok,
                "entries": found.entries,
                "reserved": found.reserved,
                "committed": found.committed,
                "data_source": found.data_source,
                "public_keys": list(found.public_keys),
                "key_checked": public_key,
                "receipt_checked": receipt is not None,
                "problems": list(found.problems),
            }
        )
    else:
        Console(highlight=False).print(
            f"{path}: {'in order' if found.ok else 'DOES NOT VERIFY'}\n"
            f"  entries {found.entries:,}, charges {found.reserved:,}, committed {found.committed:,}\n"
            f"  data source {found.data_source or '(unreadable)'},"
            f" signed by {found.public_keys[-1] if found.public_keys else 'nobody'}",
            markup=False,
            soft_wrap=True,
        )
    if public_key is None:
        warn(
            f"No key to check against: there is no {KEY} in {directory}, and no --key. A ledger that somebody else made"
            " and signed with a key of their own would pass."
        )
    if receipt is None and found.ok:
        say("Not checked: whether this is an older copy of the ledger. Only a receipt tells; give --receipt FILE.")
    if not found.ok:
        warn(f"{len(found.problems)} problem(s) in {path}:")
        for problem in found.problems:
            warn(f"  {problem}")
        warn(
            "What it says of spent privacy cannot be relied on. Stop the agent, and keep this file: it is evidence."
            f" Then move it away and bring back a backup that verifies: `fedaug ledger restore --state {directory}"
            " --from BACKUP`. Never start an empty ledger for the same data."
        )
    return found.ok


def print_receipt(directory: Path, out: Path | None) -> None:
    with LifetimeLedger(ledger_in(directory)) as ledger:
        receipt = ledger.receipt().to_dict()
    if out is not None:
        write_json(out, receipt)
        say(f"Written to {out}. Give it to whoever should be able to tell that nothing was taken off the ledger.")
    print_json(receipt)


def back_up(directory: Path, out: Path, *, as_json: bool) -> None:
    path = ledger_in(directory)
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}. Create it first.")
    with LifetimeLedger(path) as ledger:
        ledger.backup(out)
    found = verify(out, public_key=public_key_in(directory))
    if not found.ok:
        raise InputError(
            f"the backup at {out} does not verify ({'; '.join(found.problems)}): nor, most likely, does the ledger. Run"
            f" `fedaug ledger verify --state {directory}`, and keep older backups."
        )
    if as_json:
        print_json({"out": str(out), "entries": found.entries, "reserved": found.reserved})
        return
    Console(highlight=False).print(
        f"{found.entries:,} entries, {found.reserved:,} charges, written to {out}", markup=False, soft_wrap=True
    )
    say(f"Keep it on another disk, and a copy of {KEY} apart from it: a ledger can only be continued with its own key.")


def restore(directory: Path, backup: Path, *, as_json: bool) -> None:
    require_folder(directory)
    policy, key = Policy.load(directory), OwnerKey.load(directory / KEY)
    done = LifetimeLedger.restore(directory / LEDGER, backup, key=key, data_source=policy.data_source)
    if as_json:
        print_json({"num_raised": done.num_raised, "may_be_behind": done.may_be_behind})
    elif done.may_be_behind:
        print(f"The backup is the ledger now: {directory / LEDGER}")
    elif done.num_raised:
        print(f"{done.num_raised:,} charge(s) that only the backup had count as spent again.")
    else:
        print("Nothing to add: the ledger knew every charge of the backup.")
    if done.may_be_behind:
        warn(
            "It MAY BE BEHIND: what was charged after this backup was made is not on it, so more is spent than it says."
            " Ask whoever holds your newest receipt, and run `fedaug ledger verify --receipt FILE` with it. Where"
            " charges are missing, or nobody knows, lower ceilings.epsilon in policy.toml by what they may have cost"
            " before the agent runs again."
        )


def _read_receipt(path: Path) -> Receipt:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise InputError("receipt: it is no JSON object")
        return Receipt.from_dict(values)
    except (OSError, ValueError, InputError) as error:
        raise InputError(
            f"no usable receipt at {path} ({error}). Give what `fedaug ledger receipt` printed, or what a coordinator"
            " kept."
        ) from None
