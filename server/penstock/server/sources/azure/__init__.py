"""What is Azure Blob Storage's own; `objects/` does the rest.

store       all of it with its threads
source      what lies in it
location    az:// and abfss:// URIs (pure)
account     addresses, versions, and which credentials are for which account
signatures  the credentials that an account can have: key, SAS, tokens, none
identity    azure-identity's part: tokens, and why there are none; imported when first needed
listing     what lists say, parsed within bounds (pure)
answers     what error answers mean (pure)
settings    what only Azure has flags and variables for
"""
