"""Azure Blob Storage: only what is its own. `objects/` does the rest.

store       the store with its threads
source      its files and directories
location    az:// and abfss:// URIs (pure)
account     addresses, versions, and which credentials belong to which account
signatures  the kinds of credentials of an account: key, SAS, tokens, none
identity    azure-identity's part: tokens, or why there are none; imported when first needed
listing     the parser of lists, within bounds (pure)
answers     the meaning of error answers (pure)
settings    the flags and variables of Azure alone
"""
