"""What zinfer writes under the user's `nvme_path`: written once, checksummed, reused.

    <nvme_path>/zinfer-store/
        <readable name>-<12 hex of what identifies the source>/    an entry
            manifest.json        sizes and sha256 of the files; written last: its presence completes the entry
            manifest.json.done   of a copy under way: the files that are already done
            NAME.part            a file under way
            NAME.safetensors     a shard; with several paths in `nvme_path` a member of it, as in the entries of the
                                 same name under the other paths, which hold nothing else
        <the entry's name>.lock  held by the process that writes the entry; stays behind, empty

Nothing in here is ever deleted while it is complete and sound: a source that changed gets a new entry,
and the user may delete any entry that is not in use.
"""

from zinfer.store.converting import convert_bin
from zinfer.store.copying import copy_checkpoint
from zinfer.store.entry import verify
from zinfer.store.module import save_module

__all__ = ["convert_bin", "copy_checkpoint", "save_module", "verify"]
