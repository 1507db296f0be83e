"""Where the host waits: the tool behind `fastguard.find_syncs`, `fastguard.assert_sync_free` and `fastguard doctor`.

`find` is what those call, `probe` runs a pipeline's own call, `pretend` is the device that is not there, `stream` collects what the loop
does on it.
"""
