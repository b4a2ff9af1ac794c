"""The Hugging Face Hub and its mirrors, `hf://`; `objects/` does the rest.

store     all of it with its threads
source    what lies there, or in the local cache
location  hf:// URIs, and who may read them (pure)
settings  the environment's variables: endpoint, token, cache
api       what the Hub is asked: commits, trees, where the bytes of a file are
service   where requests for bytes go: to signed addresses, which expire
answers   what error answers mean (pure)
cache     repositories that huggingface_hub has fetched
memo      what was found out and holds for a while

A branch is looked up once a load, and the load reads the commit that it was. The tree of a commit says all
that opening a file needs. So a warm load costs the Hub one question, and a cold one a question more for each
file.
"""
