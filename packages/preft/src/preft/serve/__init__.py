"""`preft serve`: vLLM's own OpenAI server with adapters that are uploaded, replaced and removed while it serves.

command      the options, the defaults of the machine, the start
sums         strengths and sums of adapters by name; turns: where the earlier answers of a sticky chat are
check        is this folder an adapter that this engine can serve? asked before anything is registered
store        uploads on disk, each version in a folder of its own, so that a restart serves them again
catalog      the adapters of the running server: register, replace, remove, and unload when nothing needs them
routes       /v1/adapters over HTTP; upload: what a request brings, within the size limit
gate         the key before every route, and no new requests once the server drains
guard        vLLM's own routes that load and unload, under the same rules
endpoint     the hook by which vLLM's server takes all of this in (entry point `vllm.endpoint_plugins`)
prometheus   the counts of `preft.vllm.metrics` on the server's /metrics page
"""
