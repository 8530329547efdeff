"""Programs of other trainers: each runs by its path in an interpreter that may have none of our packages.

So they import the standard library, torch and the peer's own libraries, and measuring.py beside them, and never
anything of ours. Nothing here is imported by the product but measuring.py.
"""
