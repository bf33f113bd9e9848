"""Play: a person walks through a learned world, in a browser or a terminal.

    command   PlayConfig -> a server, or a terminal, until Ctrl-C
    worlds    folders -> worlds -> places to start from
    controls  what a person holds -> actions
    session   actions -> frames, back and forth in time; session_log keeps all of it on disk
    player    the thread that plays a session; connection, protocol, guard, server bring it to page/

Nothing is imported here: `worldloom --help` looks into `config` alone.
"""
