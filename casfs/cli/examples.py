"""The examples that the help of each command ends with."""

from __future__ import annotations

import click

EXAMPLES: dict[str, tuple[str, ...]] = {
    "init": (
        "casfs init /srv/backup",
        "casfs init sftp://host/srv/backup --recipient age1...",
        "casfs -r nas init --passphrase",
        "casfs init s3://bucket/backups --lock-for 30d",
    ),
    "backup": (
        "casfs backup /home /etc --tag daily --exclude '*.tmp' --exclude-caches",
        "casfs backup -n --exclude-file ~/.backup-excludes ~",
        "find /srv -name '*.db' -print0 | casfs backup -0 --files-from -",
        "casfs backup --stdin-from-command --stdin-name shop.sql -- pg_dump shop",
    ),
    "snapshots": ("casfs snapshots", "casfs snapshots --host web1 --latest 1 --json"),
    "ls": ("casfs ls latest:/etc", "casfs ls -h -R latest:/home/anna --host web1"),
    "find": (
        "casfs find '*.odt'",
        "casfs find -l --size +1G --snapshot latest",
        "casfs find --newer 2026-03-01 --type f 'report*'",
    ),
    "changed": ("casfs changed latest",),
    "diff": ("casfs diff 3f2a latest", "casfs diff 3f2a:/etc latest:/etc"),
    "log": ("casfs log latest:/etc/fstab",),
    "dump": (
        "casfs dump latest:/etc/fstab",
        "casfs dump latest:/home/anna | tar -xf - -C /tmp/anna",
    ),
    "mount": ("casfs mount /mnt", "casfs mount latest:/home /mnt --host web1"),
    "umount": ("casfs umount /mnt",),
    "restore": (
        "casfs restore latest:/home/anna --target /tmp/anna",
        "casfs restore latest --target / --include /etc/fstab",
        "casfs restore latest:/srv --target /srv --delete -n",
        "casfs restore latest --target /tmp/all --as-of 2026-11-20T12:00:00Z",
    ),
    "check": (
        "casfs check",
        "casfs check --older-than 30d --max-duration 20m",
        "casfs check --read-data-subset 5%",
    ),
    "forget": (
        "casfs forget --keep-daily 7 --keep-weekly 5 --keep-monthly 12 --prune",
        "casfs forget --keep-last 3 --tag test -n",
        "casfs forget 3f2a91",
    ),
    "prune": ("casfs prune", "casfs prune -n --max-unused 10%"),
    "repair index": ("casfs repair index",),
    "repair snapshots": ("casfs repair snapshots -n", "casfs repair snapshots --read-data"),
    "run": ("casfs run home", "casfs run home -n"),
    "config show": ("casfs config show",),
    "schedule install": ("casfs schedule install home", "casfs schedule install home --print"),
    "schedule remove": ("casfs schedule remove home",),
    "schedule status": ("casfs schedule status",),
    "copy": ("casfs copy latest --to cloud", "casfs -r nas copy all --to /mnt/disk"),
    "rewrite": ("casfs rewrite all --exclude '/home/*/.cache/' -n",),
    "recompress": ("casfs recompress --compression 12",),
    "mirror": ("casfs mirror /mnt/disk/casfs", "casfs -r nas mirror cloud --delete"),
    "lock-policy": ("casfs lock-policy", "casfs lock-policy --lock-for 30d"),
    "upgrade": ("casfs upgrade",),
    "locks": ("casfs locks",),
    "stats": (
        "casfs stats",
        "casfs stats latest:/home",
        "casfs stats --storage",
        "casfs -r cloud stats --requests",
    ),
    "tag": ("casfs tag latest --add keep", "casfs tag 3f2a --remove test,daily"),
    "key list": ("casfs key list",),
    "key add": ("casfs key add 'ssh-ed25519 AAAA... anna@desk'", "casfs key add --passphrase"),
    "key remove": ("casfs key remove age1qz...", "casfs key remove passphrase"),
    "key rewrap": ("casfs key rewrap --identity ~/.ssh/id_ed25519",),
    "key passwd": ("casfs key passwd",),
    "key accept": ("casfs key accept --identity /root/casfs.age",),
    "help": ("casfs help backup", "casfs help key add", "casfs help options"),
    "version": ("casfs version",),
    "completion": ("casfs completion bash > ~/.local/share/bash-completion/completions/casfs",),
}


def write_examples(name: str, formatter: click.HelpFormatter) -> None:
    """Write the examples of a command, if it has some; `name` is that of a subcommand with its group's."""
    if name in EXAMPLES:
        formatter.write_paragraph()
        with formatter.indentation():
            lines = ("\b", "Examples:", *(f"  {line}" for line in EXAMPLES[name]))
            formatter.write_text("\n".join(lines))
