# Runs a kernel in the mount namespace that `unshare` has made. Arguments: source and target of each folder to show.
# Variables: ROOT, an empty folder; SCRIPT, the kernel; PYTHON; WORKING, size of /kaggle/working; OUT, folder for its content;
# VARIABLES, NAME=value for the kernel, may be empty; TEMP, a folder to fill /kaggle/temp from, may be empty.
set -e
mount -t tmpfs -o size=64m tmpfs "$ROOT"
show() {  # mount a folder read-only: source, target
  mkdir -p "$ROOT$2"
  mount --rbind "$1" "$ROOT$2"
  mount -o remount,bind,ro "$ROOT$2" 2>/dev/null || mount -o remount,bind,ro,nosuid,nodev "$ROOT$2"
}
for path in /bin /etc /lib* /nix /sbin /usr; do
  if [ -L "$path" ]; then cp -P "$path" "$ROOT$path"
  elif [ -d "$path" ]; then show "$path" "$path"
  fi
done
mkdir "$ROOT/dev" "$ROOT/proc" "$ROOT/sys"
mount --rbind /dev "$ROOT/dev"
mount --rbind /sys "$ROOT/sys"
mount -t proc proc "$ROOT/proc" 2>/dev/null || mount --rbind /proc "$ROOT/proc"
for path in /tmp /kaggle/working /kaggle/temp; do
  mkdir -p "$ROOT$path"
  mount -t tmpfs -o "size=$WORKING" tmpfs "$ROOT$path"
done
if [ -n "$TEMP" ]; then cp -r "$TEMP/." "$ROOT/kaggle/temp"; fi
mkdir -p "$ROOT/kaggle/input" "$ROOT/kaggle/src"
cp "$SCRIPT" "$ROOT/kaggle/src/kernel.py"
while [ $# -gt 0 ]; do show "$1" "$2"; shift 2; done
mount -o remount,bind,ro "$ROOT"
ip link set lo up 2>/dev/null || true
# the main module has no file, as in a notebook
CODE="exec(compile(open('/kaggle/src/kernel.py').read(), 'kernel.py', 'exec'))"
set +e
chroot "$ROOT" /usr/bin/env -i PATH=/usr/bin:/bin HOME=/kaggle/temp TMPDIR=/tmp LANG=C.UTF-8 MPLBACKEND=agg \
  TF_CPP_MIN_LOG_LEVEL=2 PYTHONUNBUFFERED=1 KAGGLE_KERNEL_RUN_TYPE=Batch $VARIABLES \
  /bin/sh -c 'cd /kaggle/working && exec "$0" -c "$1"' "$PYTHON" "$CODE" < /dev/null
status=$?
cp -r "$ROOT/kaggle/working/." "$OUT"
exit $status
