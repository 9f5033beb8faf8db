"""What a pod will do with a program: compiled by the pod's own compiler, on any machine, before anybody pays."""
