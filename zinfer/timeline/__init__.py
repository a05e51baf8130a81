"""What happened when: a recorder of reads, copies, operators and waits, trace files, and a picture."""
