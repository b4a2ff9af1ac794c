"""The Hugging Face Hub and its mirrors, `hf://`; `objects/` does the rest.

store     the Hub with its threads
source    its files and directories, and those of the local cache
location  hf:// URIs, and who may read them (pure)
settings  the environment's variables: endpoint, token, cache
api       questions to the Hub: commits, trees, where the bytes of a file are
tree      the files of a commit, as the Hub lists them
service   where requests for bytes go: to signed addresses, which expire
answers   the meaning of error answers (pure)
cache     repositories that huggingface_hub has fetched

A branch is looked up once a load. The load reads the commit that the branch is at then. The tree of a commit
has all that opening a file needs. So a warm load sends one request to the Hub, and a cold one sends one more
for each file.
"""
