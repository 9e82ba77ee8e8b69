"""Tries what the documentation says about installing, in a Debian root that has nothing else (debootstrap).

    python -m deploy.clean_root.image --root DIR      each step of deploy/Dockerfile, then the container's process
    python -m deploy.clean_root.first_answer --root DIR    from `git clone` to the first answer: time, bytes, disk

Both need root and Debian's packages `debootstrap`, `git` and `make`. They are no part of the suite: each takes minutes.
"""
